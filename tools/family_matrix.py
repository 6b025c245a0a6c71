"""Tries every causal language model of transformers with a tiny random config, and says what became of it.

    python -m tools.family_matrix                  # prints one line per model_type
    python -m tools.family_matrix --only llama,phi3
    python -m tools.family_matrix --write          # README.md and exporters/families/MATRIX.md
    python -m tools.family_matrix --only llama --write    # that row of both, the others as they are

For each model_type a config is made from the library's own defaults with small dimensions, a random model is saved as
a checkpoint, opened and captured as a build does it, and the captured Program is run in PyTorch (its fused ops by
their references), in chunks, against the model's own eager forward. `exact` is a relative error of at most 1e-5.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import resource
import signal
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporters.errors import ExportError
from exporters.families.decoder_lm import capture_lm
from exporters.families.language_models import FAMILIES
from exporters.model_config import check_model_config
from exporters.program import Program
from exporters.student import load_student

CAPACITY, VOCAB = 48, 131
#: Tokens per step: a prompt, a chunk, single steps and a chunk again.
CHUNKS = (24, 8, 1, 1, 6)
LIMIT = 1e-5
NO_CONFIG = "no small config made here runs in the library itself"
ROOT = Path(__file__).parent.parent
_ROW = re.compile(r"^\| `([^`]+)` \| (exact|wrong|refused|not tried): (.*) \|$", re.MULTILINE)
README, TABLE = ROOT / "README.md", ROOT / "exporters" / "families" / "MATRIX.md"
HEADER = """# Every causal language model of transformers

Written by `python -m tools.family_matrix --write`, whole or some rows at a time (`--only A,B --write`): a random model
of each model_type with small dimensions is saved, opened and captured as a build does it; the captured Program runs in
PyTorch, in chunks, against the model's own eager
forward. `exact`: the relative error, at most 1e-5. `not tried`: no small config was found that the library itself
runs; a checkpoint of it goes the same way, and is exported or refused like the others."""

#: What every config is made small with, under the library's standard names; what a config class does not have is
#: passed over, and what it spells otherwise is found by its attribute_map.
SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=40,
    intermediate_size=56,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    initializer_range=0.3,
    init_std=0.3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    sliding_window=7,
    rotary_dim=8,
    is_decoder=True,
    head_dim=16,
    # Encoder-decoders, of which the decoder alone is made.
    d_model=40,
    decoder_layers=3,
    encoder_layers=1,
    decoder_attention_heads=4,
    encoder_attention_heads=4,
    decoder_ffn_dim=56,
    encoder_ffn_dim=56,
    ffn_dim=56,
    # Learned absolute positions.
    word_embed_proj_dim=40,
    n_inner=56,
    # Recurrent layers: heads of 20 are twice the hidden size.
    mamba_n_heads=4,
    mamba_d_ssm=80,
    n_shared_experts=1,
    mamba_d_head=20,
    mamba_d_state=8,
    mamba_n_groups=1,
    state_size=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
)
#: What else a family needs, where it takes no less or where the library's default is of full size.
OWN: dict[str, dict[str, Any]] = {
    "phi": dict(hidden_size=64),
    "helium": dict(hidden_size=64),
    "persimmon": dict(hidden_size=64),
    "codegen": dict(hidden_size=64),
    "gptj": dict(hidden_size=64),
    "gpt_neo": dict(attention_types=[[["global", "local", "global"], 1]], window_size=7),
    "mamba2": dict(num_heads=4, head_dim=20, n_groups=1),
    "zaya": dict(num_experts_per_tok=1),
    "xlnet": dict(d_head=10, d_inner=56),
    "prophetnet": dict(num_decoder_attention_heads=4, num_encoder_attention_heads=4, num_decoder_layers=3),
    "lfm2_moe": dict(layer_types=["full_attention", "conv", "full_attention"], num_dense_layers=1),
    "gemma3n_text": dict(
        num_hidden_layers=10, num_kv_shared_layers=5, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8,
        activation_sparsity_pattern=[0.0] * 10, laurel_rank=8,
    ),
    "gemma4_text": dict(
        num_hidden_layers=12, num_kv_shared_layers=6, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8
    ),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=100.0, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=24, moe_num_experts=4, moe_top_k=2),
    ),
    "zamba2": dict(layer_types=["mamba", "hybrid", "mamba"]),
}  # fmt: skip
#: And those of multi-head latent attention.
LATENT = dict(
    kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_group=1, topk_group=1,
    num_key_value_heads=4, head_dim=8,
)  # fmt: skip
#: Parameters of the largest model that is made: what no key makes small is not tried.
MOST_PARAMETERS = 20_000_000
#: Bytes that a run may allocate.
MEMORY = 4 << 30


@dataclass(frozen=True)
class Outcome:
    """What became of one model_type: the relative error, or why there is none."""

    model_type: str
    error: float | None
    reason: str

    @property
    def status(self) -> str:
        if self.error is None:
            return "not tried" if self.reason.startswith(NO_CONFIG) else "refused"
        return "exact" if self.error <= LIMIT else "wrong"


def tiny_config(model_type: str, options: dict[str, Any] | None = None):
    """The library's config of a model_type with small dimensions."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    default = kind()
    small = SMALL | (LATENT if _has(default, "kv_lora_rank") else {})
    settable = {key for key in small if not isinstance(getattr(kind, key, None), property)}
    values = {key: small[key] for key in settable if _has(default, key)} | OWN.get(model_type, {}) | (options or {})
    return kind(**{kind.attribute_map.get(key, key): value for key, value in values.items()})


def _has(config: Any, key: str) -> bool:
    try:
        return hasattr(config, key)
    except Exception:  # AmbiguousGlobalPerLayerAttributeError: it has one value for each layer, which it keeps
        return False


def random_model(config) -> torch.nn.Module:
    """A random model in float32 and eval mode whose norms and biases are random too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # ones and zeros would hide a mistake
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def run_program(program: Program, ids: np.ndarray, chunks: Sequence[int]) -> np.ndarray:
    """Logits [len(chunks), V] after each chunk of ids [1, T], by the Program's graph in PyTorch."""
    names = program.stored
    weights = {}
    for node in program.exported.graph.find_nodes(op="placeholder"):
        if node.name in names and (name := names[node.name]) in program.constants:
            weights[node.name] = torch.from_numpy(np.array(program.constants[name].load()))
    states = [torch.zeros(state.shape) for state in program.states]
    interpreter, rows, end = torch.fx.Interpreter(program.exported.graph_module), [], 0
    placeholders = [node.name for node in program.exported.graph.find_nodes(op="placeholder")]
    for size in chunks:
        end += size
        given = iter((torch.from_numpy(ids[:, end - size : end]), torch.tensor([end - 1], dtype=torch.int32), *states))
        feeds = [weights.get(name) if name in names else next(given) for name in placeholders]
        with torch.no_grad():
            logits, *states = interpreter.run(*feeds)
        rows.append(logits[0].numpy())
    return np.stack(rows)


def compare(folder: Path, model: torch.nn.Module) -> float:
    """Relative error of the captured Program of a checkpoint against the model it was saved from."""
    ids = np.random.default_rng(0).integers(3, VOCAB, (1, sum(CHUNKS))).astype(np.int32)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids).long(), use_cache=False).logits[0].numpy()
    expected = logits[np.cumsum(CHUNKS) - 1]
    got = run_program(capture_lm(load_student(folder), CAPACITY), ids, CHUNKS)
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def attempt(model_type: str) -> Outcome:
    """Builds, saves, captures and compares one model_type."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = tiny_config(model_type)
            check_model_config(json.loads(config.to_json_string(use_diff=False)))
        except ExportError as error:
            return Outcome(model_type, None, f"{error.where}: {error.what}")
        except Exception as error:  # no tiny config can be made: whatever a config class raises
            return Outcome(model_type, None, f"{NO_CONFIG}: {_line(error)}")
        try:
            with time_limit():
                _check_size(config)
                model = random_model(config)
                model.save_pretrained(folder)
        except Exception as error:  # as above
            return Outcome(model_type, None, f"{NO_CONFIG}: {_line(error)}")
        try:
            with torch.no_grad():
                model(torch.arange(3, 9)[None], use_cache=False)
        except Exception as error:  # the library's own model does not run as it was made
            return Outcome(model_type, None, f"{NO_CONFIG}: {_line(error)}")
        try:
            with time_limit():
                return Outcome(model_type, compare(Path(folder), model), "")
        except ExportError as error:
            return Outcome(model_type, None, f"{error.where}: {error.what}")
        except Exception as error:  # a fault of this program, which the table says
            return Outcome(model_type, None, f"fault: {_line(error)}")


def _check_size(config: Any) -> None:
    """Raises ValueError for a model that is not small: some defaults are of full size where no key makes them small."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if (count := sum(parameter.numel() for parameter in model.parameters())) > MOST_PARAMETERS:
        raise ValueError(f"it has {count} parameters")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


@contextmanager
def time_limit(seconds: int = 240) -> Iterator[None]:
    """Raises TimeoutError in the main thread."""

    def expire(signum: int, frame: object) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def write_tables(outcomes: Sequence[Outcome]) -> None:
    """The families known by name into README.md, every model_type into exporters/families/MATRIX.md."""
    found = read_table() | {outcome.model_type: outcome for outcome in outcomes}
    rows = ["| model_type | what is special | Program against eager |", "| --- | --- | --- |"]
    rows += [f"| `{name}` | {special} | {_cell(found[name])} |" for name, special in FAMILIES.items()]
    exact = [name for name, outcome in found.items() if outcome.status == "exact"]
    generic = [name for name in exact if name not in FAMILIES]
    rows += ["", f"The same way, by their modules alone: {', '.join(f'`{name}`' for name in generic)}. The other"]
    rows += [
        f"{len(found) - len(exact)} of transformers' {len(found)} decoders are refused or could not be tried here, "
    ]
    rows[-1] += f"each with its reason in [exporters/families/MATRIX.md]({TABLE.relative_to(ROOT).as_posix()})."
    text = README.read_text("utf-8")
    start, end = (text.index(f"<!-- {mark} -->") for mark in ("families", "/families"))
    block = "<!-- families -->\n" + "\n".join(rows) + "\n"
    README.write_text(text[:start] + block + text[end:], "utf-8")
    lines = [HEADER, "", "| model_type | outcome |", "| --- | --- |"]
    lines += [f"| `{name}` | {_cell(found[name])} |" for name in sorted(found)]
    TABLE.write_text("\n".join(lines) + "\n", "utf-8")


def read_table() -> dict[str, Outcome]:
    """The outcomes that exporters/families/MATRIX.md holds."""
    found = {}
    for name, status, said in _ROW.findall(TABLE.read_text("utf-8")):
        number = float(said) if status in ("exact", "wrong") else None
        found[name] = Outcome(name, number, "" if number is not None else said.replace("\\|", "|"))
    return found


def _cell(outcome: Outcome) -> str:
    reason = outcome.reason.replace("|", "\\|")
    return f"{outcome.status}: {outcome.error:.1e}" if outcome.error is not None else f"{outcome.status}: {reason}"


def main() -> None:
    """Command line."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="A,B", help="model_types to try (default: all)")
    parser.add_argument("--write", action="store_true", help="write both tables; with --only, those rows of them")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    outcomes = []
    for model_type in options.only.split(",") if options.only else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        outcomes.append(attempt(model_type))
        print(outcomes[-1].model_type, _cell(outcomes[-1]), flush=True)
    if options.write:
        write_tables(outcomes)


if __name__ == "__main__":
    main()
