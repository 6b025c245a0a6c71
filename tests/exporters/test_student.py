"""Student: what a package holds, read back against the libraries that wrote it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from exporters.errors import PackageError, WeightsError
from exporters.student import Student, load_student
from tests.conftest import MakeStudent

VARIANTS = ["float", "int8", "int4"]
TYPES = ["llama", "qwen3"]


@pytest.fixture(params=[f"{kind}-{variant}" for kind in TYPES for variant in VARIANTS])
def student(request: pytest.FixtureRequest, make_tiny_student: MakeStudent) -> Student:
    """Each tiny student, loaded."""
    kind, variant = request.param.split("-")
    return load_student(make_tiny_student(variant=variant, model_type=kind))


def _state(student: Student) -> dict[str, torch.Tensor]:
    """All weights of the decoder as float32, by the names of transformers."""
    state = {name: student.tensor(name).float() for name in student.tensors}
    for module, tensor in student.quantized.items():
        state[f"{module}.weight"] = torch.from_numpy(tensor.dequantize())
    return state | {name: state[source] for name, source in student.tied.items()}


def _decompressed(folder: Path) -> dict[str, torch.Tensor]:
    """The decoder's weights by the libraries alone: safetensors reads the files, compressed-tensors decompresses.

    transformers 5.23 cannot load such a checkpoint by itself: it expects zero points unpacked, and leaves a head that
    is tied to a quantised embedding in int8.
    """
    stored: dict[str, torch.Tensor] = {}
    for path in folder.glob("model-*.safetensors"):
        stored |= load_file(path)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    schemes = {
        target: QuantizationScheme.model_validate(group)
        for group in config["config_groups"].values()
        for target in group["targets"]
    }
    modules = {name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")}
    state = {name: value for name, value in stored.items() if name.rpartition(".")[0] not in modules}
    for module in modules:
        parts = {name.rpartition(".")[2]: value for name, value in stored.items() if name.startswith(module + ".")}
        parts["weight_scale"] = parts["weight_scale"].float()
        scheme = schemes["Embedding" if module.endswith("embed_tokens") else "Linear"]
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        state[f"{module}.weight"] = compressor.decompress(parts, scheme)["weight"]
    return state | {"lm_head.weight": state["model.embed_tokens.weight"]}


def test_it_is_the_model_that_the_libraries_make(student: Student) -> None:
    from transformers import AutoModelForCausalLM

    ours = AutoModelForCausalLM.from_config(student.library_config()).eval()
    ours.load_state_dict(_state(student), strict=True)
    if student.quantized:
        theirs = AutoModelForCausalLM.from_config(student.library_config()).eval()
        theirs.load_state_dict(_decompressed(student.folder), strict=True)
    else:
        theirs = AutoModelForCausalLM.from_pretrained(student.folder, dtype=torch.float32).eval()
    ids = torch.tensor([[64, 5, 9, 67, 80, 103, 104, 120, 65]])
    with torch.no_grad():
        wanted, found = theirs(ids).logits, ours(ids).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_which_tensors_are_quantised(student: Student) -> None:
    names = set(_state(student))
    if student.name.endswith("float"):
        assert not student.quantized
    else:
        assert set(student.quantized) == {
            name.removesuffix(".weight") for name in names if "proj" in name or "embed_tokens" in name
        }
        embedding = student.quantized["model.embed_tokens"]
        assert (embedding.bits, embedding.group, embedding.zero_points) == (8, 64, None)
        proj = student.quantized["model.layers.1.mlp.down_proj"]
        four = student.name.endswith("int4")
        assert (proj.bits, proj.group, proj.shape) == ((4, 32, (64, 128)) if four else (8, 128, (64, 128)))
        assert (proj.zero_points is not None) == four
        assert proj.scale_dtype == "float16"
    assert student.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert not set(student.tensors) & {f"{module}.weight" for module in student.quantized}


def test_special_ids_and_modalities(student: Student) -> None:
    assert student.special == {"bos": 64, "eos": [65], "pad": 66}
    image, audio = student.modalities["image"], student.modalities["audio"]
    assert (image.begin_id, image.end_id, audio.begin_id, audio.end_id) == (67, 68, 69, 70)
    assert student.tokenizer is not None
    tokenizer = Tokenizer.from_file(str(student.tokenizer))
    assert tokenizer.token_to_id("<audio>") == audio.begin_id
    ids = tokenizer.encode("a handwritten seven").ids
    assert max(ids) < student.modalities["text"].end
    assert tokenizer.decode(ids) == "a handwritten seven"


def test_codes_are_those_on_disk(make_tiny_student: MakeStudent) -> None:
    folder = make_tiny_student()
    student = load_student(folder)
    stored: dict[str, torch.Tensor] = {}
    for path in folder.glob("model-*.safetensors"):
        stored |= load_file(path)
    module = "model.layers.0.self_attn.k_proj"
    assert student.quantized[module].codes.tobytes() == stored[f"{module}.weight_packed"].numpy().tobytes()
    embedding = stored["model.embed_tokens.weight"].numpy().view(np.uint8) ^ 0x80
    assert student.quantized["model.embed_tokens"].codes.tobytes() == embedding.tobytes()


def test_the_image_discretizer(tiny_student: Path) -> None:
    module = load_student(tiny_student).discretizer("image")
    assert not module.training
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in module.parameters())
    stored = load_file(tiny_student / "discretizers" / "image" / "model.safetensors")
    assert all(tensor.equal(stored[name]) for name, tensor in module.state_dict().items())
    with torch.no_grad():
        latents = module.encode(torch.rand(2, 1, 16, 16) * 2 - 1).latents  # type: ignore[operator]
    assert latents.shape[2:] == (4, 4)


@pytest.mark.parametrize("audio_weights", ["model.safetensors", "model.pth"])
@pytest.mark.parametrize("hop", [(4, 4), (2, 8), (8, 8)])
def test_the_audio_discretizer(make_tiny_student: MakeStudent, audio_weights: str, hop: tuple[int, ...]) -> None:
    student = load_student(make_tiny_student(audio_weights=audio_weights, hop=hop))
    module = student.discretizer("audio")
    preprocessing = student.modalities["audio"].preprocessing
    assert preprocessing is not None
    samples = preprocessing["samples"]
    with torch.no_grad():
        codes = module.encode(torch.randn(1, 1, samples)).audio_codes  # type: ignore[operator]
        sound = module.decode(audio_codes=codes).audio_values  # type: ignore[operator]
    assert codes.shape == (1, 2, 6)
    assert sound.shape == (1, samples)
    assert sound.std() > 0.01


def test_both_forms_of_discretizer_weights_are_the_same_module(make_tiny_student: MakeStudent) -> None:
    first, second = (
        load_student(make_tiny_student(audio_weights=name)).discretizer("audio").state_dict()
        for name in ("model.safetensors", "model.pth")
    )
    assert all(tensor.equal(second[name]) for name, tensor in first.items())


def test_a_modality_without_a_discretizer(tiny_student: Path) -> None:
    student = load_student(tiny_student)
    for name in ("text", "video"):
        with pytest.raises(PackageError, match="image, audio"):
            student.discretizer(name)


def test_weights_stay_on_disk(tiny_student: Path) -> None:
    """A tensor is a view of the mapped file: asked for twice, it is the same memory."""
    student = load_student(tiny_student)
    name = "model.norm.weight"
    assert student.tensor(name).data_ptr() == student.tensor(name).data_ptr()
    with pytest.raises(KeyError):
        student.tensor("model.embed_tokens.weight")  # quantised, so not a float tensor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_keep_their_dtype(
    make_tiny_student: MakeStudent, tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = _plain(make_tiny_student(variant="float"), tmp_path, dtype)
    student = load_student(folder)
    assert student.tensor("model.norm.weight").dtype == dtype
    assert student.tensors["model.norm.weight"].nbytes == 128


def _plain(package: Path, target: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A plain transformers folder, one file of weights, from a package."""
    folder = target / "plain"
    folder.mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.copy(package / name, folder)
    shutil.copy(package / "tokenizer" / "tokenizer.json", folder)
    tensors: dict[str, torch.Tensor] = {}
    for path in package.glob("model-*.safetensors"):
        tensors |= load_file(path)
    cast = {name: tensor.to(dtype) if tensor.dtype == torch.float32 else tensor for name, tensor in tensors.items()}
    save_file(cast, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_plain_transformers_folder(make_tiny_student: MakeStudent, tmp_path: Path, variant: str) -> None:
    package = load_student(make_tiny_student(variant=variant))
    student = load_student(_plain(package.folder, tmp_path))
    assert (student.name, student.version, set(student.modalities)) == ("plain", "0.0.0", {"text"})
    assert student.special == package.special
    ours, theirs = _state(student), _state(package)
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())
    student.verify_unchanged()


def test_what_transformers_saves_is_accepted(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "saved")
    student = load_student(tmp_path / "saved")
    assert student.tokenizer is None
    assert not student.tied
    assert student.tensors["lm_head.weight"].shape == (50, 32)


def test_a_tied_head_stored_twice(make_tiny_student: MakeStudent, tmp_path: Path) -> None:
    folder = _plain(make_tiny_student(variant="float"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, folder / "model.safetensors")
    assert "lm_head.weight" not in load_student(folder).tensors
    save_file(tensors | {"lm_head.weight": embedding + 1}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match="lm_head"):
        load_student(folder)


def test_the_hash_says_nothing_of_the_place(tiny_student: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_student, tmp_path / "copy")
    assert load_student(copy).sha256 == load_student(tiny_student).sha256


def test_verifying_reads_each_file_once(tiny_student: Path) -> None:
    """Counted by the operating system."""
    student = load_student(tiny_student)
    before = _bytes_read()
    student.verify_unchanged()
    size = sum(entry.size for entry in student.files.values())
    hashed = _bytes_read() - before
    assert size <= hashed < 1.2 * size + (1 << 16)


def _bytes_read() -> int:
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["rchar"])
