"""Step `quantize`: int8 per channel, and int4 in groups of 32 by GPTQ with the embedding and head at 8 bit.

Written with the compressed-tensors library's own compressors and configuration classes, and read
back by them: the decompressed weights must equal the dequantised ones bit for bit.
"""

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, QuantizationStatus
from transformers import LlamaForCausalLM

from exporters.quantise.gptq import gptq
from exporters.quantise.grids import Grid, Width, round_to_nearest
from tools.reference_student import lm, student, vocabulary
from tools.reference_student.training import SEED, arguments, save_atomically

BITS, GROUP = 4, 32
#: One symmetric 8-bit scale for each row.
CHANNEL = Width(8)
EMBEDDING = "model.embed_tokens"
CALIBRATION = {"text_to_image": 48, "image_to_text": 48, "text_to_audio": 48, "audio_to_text": 48}
# Linears that read the same input share one pass over the calibration rows.
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


class QuantizationError(ValueError):
    """What was written does not read back as what was computed; the message names the module."""


def schemes(variant: str) -> dict[str, QuantizationScheme]:
    """The compressed-tensors schemes of a variant ("int8" or "int4") by group name."""
    channel = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    if variant == "int8":
        return {
            "group_0": QuantizationScheme(
                targets=["Linear", "re:.*embed_tokens$"], weights=channel, format="int-quantized"
            )
        }
    grouped = QuantizationArgs(num_bits=BITS, type="int", symmetric=False, strategy="group", group_size=GROUP)
    return {
        "group_0": QuantizationScheme(targets=["Linear"], weights=grouped, format="pack-quantized"),
        "group_1": QuantizationScheme(targets=["re:.*embed_tokens$"], weights=channel, format="int-quantized"),
    }


def config(variant: str) -> dict:
    """The `quantization_config` of config.json. The tied head is ignored: it reads the embedding's codes."""
    groups = schemes(variant)
    formats = {group.format for group in groups.values()}
    return QuantizationConfig(
        config_groups=groups,
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=["lm_head"],
    ).model_dump(mode="json")


def scheme_of(variant: str, module: str) -> QuantizationScheme:
    """The scheme that a module falls under."""
    groups = schemes(variant)
    return groups["group_1"] if variant == "int4" and module == EMBEDDING else groups["group_0"]


@torch.no_grad()
def _hessians(
    model: LlamaForCausalLM, names: list[str], ids: torch.Tensor, kept: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Second moments [K,K] of the inputs of the named linears over the rows' kept positions."""
    found: dict[str, torch.Tensor] = {}

    def watch(name: str):
        def hook(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0][kept].double()
            found[name] = rows.T @ rows / len(rows)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def int4_grids(model: LlamaForCausalLM, ids: torch.Tensor, kept: torch.Tensor) -> dict[str, Grid]:
    """GPTQ layer by layer, each on what the quantised layers before it produce. Changes the model's weights."""
    embedding = round_to_nearest(model.model.embed_tokens.weight, CHANNEL)
    model.model.embed_tokens.weight.copy_(embedding.dequantize())
    grids = {EMBEDDING: embedding}
    for layer in range(model.config.num_hidden_layers):
        for stage in STAGES:
            names = [f"model.layers.{layer}.{name}" for name in stage]
            for name, hessian in _hessians(model, names, ids, kept).items():
                module = model.get_submodule(name)
                grids[name] = gptq(module.weight.float(), hessian, Width(BITS, GROUP))
                module.weight.copy_(grids[name].dequantize())
    return grids


@torch.no_grad()
def int8_grids(model: LlamaForCausalLM) -> dict[str, Grid]:
    """Round to nearest, one scale for each output channel, embedding included."""
    names = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    return {name: round_to_nearest(model.get_submodule(name).weight, CHANNEL) for name in [EMBEDDING, *names]}


def compress(variant: str, grids: dict[str, Grid]) -> dict[str, torch.Tensor]:
    """Checkpoint tensors of the quantised modules, checked by decompressing them again."""
    tensors = {}
    for module, grid in grids.items():
        scheme = scheme_of(variant, module)
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        value = grid.dequantize()
        state = {"weight": value, "weight_scale": grid.scales}
        if not scheme.weights.symmetric:
            state["weight_zero_point"] = grid.zero_points
        packed = compressor.compress(state, scheme)
        if not torch.equal(compressor.decompress(packed, scheme)["weight"], value):
            raise QuantizationError(f"{module}: {scheme.format} does not decompress to the dequantised weights")
        tensors |= {f"{module}.{name}": tensor.contiguous() for name, tensor in packed.items()}
    return tensors


def dequantized(tensors: dict[str, torch.Tensor], variant: str) -> dict[str, torch.Tensor]:
    """The student's float32 state dict from the checkpoint tensors of any variant, by the library's decompressors."""
    state = {}
    modules = {name.rpartition(".")[0] for name in tensors if name.endswith(".weight_scale")}
    for name, value in tensors.items():
        if name.rpartition(".")[0] not in modules:
            state[name] = value.float()
    for module in modules:
        scheme = scheme_of(variant, module)
        own = {
            name.removeprefix(f"{module}."): value
            for name, value in tensors.items()
            if name.rpartition(".")[0] == module
        }
        state[f"{module}.weight"] = BaseCompressor.get_value_from_registry(scheme.format).decompress(own, scheme)[
            "weight"
        ]
    return {**state, "lm_head.weight": state[f"{EMBEDDING}.weight"]}


def float_tensors(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The float16 checkpoint of the float student (the tied head is not stored twice)."""
    return {name: value.half().contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}


def main() -> None:
    """Write `work/quantized_{float,int8,int4}.pt`: the checkpoint tensors of the three packages."""
    options = arguments(__doc__)
    words = vocabulary.load(options.work / "tokenizer")
    model = student.load(options.work)
    whole = float_tensors(model)
    torch.manual_seed(SEED)
    batch = lm.Rows(options.work, words).batch(CALIBRATION)
    grids = {"int8": int8_grids(model)}
    grids["int4"] = int4_grids(model, batch.ids, batch.ids != words.pad)
    save_atomically(whole, options.work / "quantized_float.pt")
    for variant, found in grids.items():
        kept = {name: value for name, value in whole.items() if name.removesuffix(".weight") not in found}
        save_atomically({**kept, **compress(variant, found)}, options.work / f"quantized_{variant}.pt")
        print(variant, f"{sum(value.nbytes for value in (kept | compress(variant, found)).values()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
