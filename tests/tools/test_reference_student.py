"""The shipped reference student: it validates, reads back, keeps its data apart, and its outputs are recognised."""

import json

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from diffusers import VQModel
from safetensors.torch import load_file
from transformers import DacConfig, DacModel, LlamaConfig, LlamaForCausalLM

from exporters.package import validate
from tools.reference_student import audio_codec, generation, image_codec, judges, vocabulary
from tools.reference_student.assemble import SHIPPED, VARIANTS, assemble
from tools.reference_student.quantize import dequantized

MOST_BYTES = 8_000_000
EVIDENCE = judges.SHIPPED.parent


def shard_tensors(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {}
    for file in sorted(set(index.values())):
        shard = load_file(folder / file)
        assert {index[name] for name in shard} == {file}
        tensors |= shard
    assert tensors.keys() == index.keys()
    return tensors


def load_float():
    config = json.loads((SHIPPED / "float" / "config.json").read_text())
    model = LlamaForCausalLM(LlamaConfig(**config))
    missing, unexpected = model.load_state_dict(
        {name: value.float() for name, value in shard_tensors(SHIPPED / "float").items()}, strict=False
    )
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    return model.eval()


def load_discretizer(kind):
    folder = SHIPPED / "shared" / "discretizers" / kind
    config = json.loads((folder / "config.json").read_text())
    del config["preprocessing"], config["student_version"]
    model = VQModel.from_config(config) if kind == "image" else DacModel(DacConfig(**config))
    model.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
    return model.eval()


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    return load_float(), vocabulary.load(SHIPPED / "shared" / "tokenizer")


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_assembles_to_a_valid_package(variant, tmp_path):
    package = validate(assemble(variant, tmp_path / "student"))
    assert package.name == f"reference-student-{variant}"
    assert package.license == "CC-BY-SA-4.0"
    assert (
        len(set(json.loads((package.folder / "model.safetensors.index.json").read_text())["weight_map"].values())) >= 2
    )
    for card in ("MODEL_CARD.md", "DATA_CARD.md"):
        text = (package.folder / card).read_text()
        assert "CC BY-SA 3.0" in text and "CC BY-SA 4.0" in text and "Z. Jackson" in text and "Y. LeCun" in text


def test_everything_shipped_fits_the_budget():
    files = [path for folder in (SHIPPED, EVIDENCE) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    assert sum(path.stat().st_size for path in (SHIPPED / "shared" / "samples").iterdir()) < 100_000


def test_no_sample_of_training_is_held_out():
    hashes = load_file(EVIDENCE / "splits.safetensors")
    for kind in ("image", "recording"):
        held_out = set(hashes[f"held_out.{kind}_hashes"].tolist())
        assert len(held_out) == len(hashes[f"held_out.{kind}_hashes"]) >= 290
        for split in ("train", "validation"):
            assert not held_out & set(hashes[f"{split}.{kind}_hashes"].tolist())


def test_shipped_samples_are_held_out():
    from tools.reference_student.data import content_hash

    hashes = load_file(EVIDENCE / "splits.safetensors")
    for file, name, kind in (("images", "images", "image"), ("audio", "recordings", "recording")):
        samples = load_file(SHIPPED / "shared" / "samples" / f"{file}.safetensors")[name].numpy()
        # safetensors hands uint64 to torch as such; its list holds the same Python integers.
        assert {content_hash(sample) for sample in samples} <= set(hashes[f"held_out.{kind}_hashes"].tolist())


@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_quantized_packages_decompress_with_the_library(variant):
    """Formats, schemes and names as compressed-tensors has them: its own decompressor reads every quantised module."""
    config = json.loads((SHIPPED / variant / "config.json").read_text())
    quantization = QuantizationConfig.model_validate(config["quantization_config"])
    tensors = shard_tensors(SHIPPED / variant)
    whole = dequantized(tensors, variant)
    modules = {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}
    assert len(modules) == 1 + 7 * config["num_hidden_layers"]
    for module in modules:
        kind = "Embedding" if module.endswith("embed_tokens") else "Linear"
        scheme = [
            group
            for group in quantization.config_groups.values()
            if any(target == kind or match_name(module, target) for target in group.targets)
        ]
        assert len(scheme) == 1
        own = {
            name.removeprefix(f"{module}."): value
            for name, value in tensors.items()
            if name.rpartition(".")[0] == module
        }
        read = BaseCompressor.get_value_from_registry(scheme[0].format).decompress(own, scheme[0])["weight"]
        assert torch.equal(read, whole[f"{module}.weight"])
        assert torch.equal(own["weight_scale"].half().float(), own["weight_scale"])
    reference = load_float().state_dict()
    errors = [float((whole[name] - value).norm() / value.norm()) for name, value in reference.items()]
    assert max(errors) < (0.02 if variant == "int8" else 0.25)


def test_vocabulary_is_contiguous_and_text_spells_no_code(student):
    _, words = student
    table = json.loads((SHIPPED / "int4" / "package.json").read_text())["modalities"]
    assert table["image"]["tokens"][1] == table["audio"]["tokens"][0]
    assert (
        table["audio"]["tokens"][1]
        == words.size
        == json.loads((SHIPPED / "int4" / "config.json").read_text())["vocab_size"]
    )
    assert max(words.encode("<image_17> <audio_3> draw a seven")) < vocabulary.TEXT
    assert words.decode(words.encode("a handwritten seven")) == "a handwritten seven"


def test_a_generated_picture_and_utterance_are_recognised(student):
    """Greedy, float32; the prompts are ordinary ones of the README."""
    model, words = student
    image, audio = load_discretizer("image"), load_discretizer("audio")
    ids = generation.generate(
        model, words, [[words.bos, *words.encode("a handwritten seven"), words.image_begin]], "image"
    )
    with torch.no_grad():
        picture = image_codec.decode(image, generation.image_codes(words, ids))[0, 0] * 0.5 + 0.5
    assert judges.image_digit(picture.clamp(0, 1).numpy()) == 7
    ids = generation.generate(model, words, [[words.bos, *words.encode("say three"), words.audio_begin]], "audio")
    with torch.no_grad():
        sound = audio_codec.decode(audio, generation.audio_codes(words, ids))[0]
    assert judges.spoken_digit(sound.numpy()) == 3


def test_judges_recognise_real_samples_and_refuse_other_arrays():
    samples = load_file(SHIPPED / "shared" / "samples" / "images.safetensors")
    found = [judges.image_digit(image.numpy()) for image in samples["images"]]
    assert np.mean(np.array(found) == samples["labels"].numpy()) >= 0.9
    sounds = load_file(SHIPPED / "shared" / "samples" / "audio.safetensors")
    heard = [judges.spoken_digit(sound.numpy()) for sound in sounds["recordings"]]
    assert np.mean(np.array(heard) == sounds["labels"].numpy()) >= 0.8
    with pytest.raises(judges.JudgeInputError, match="shape"):
        judges.image_digit(np.zeros((3, 32, 32), np.uint8))
    with pytest.raises(judges.JudgeInputError, match="shape"):
        judges.spoken_digit(np.zeros((2, 100), np.int16))


def test_shipped_sequences_are_well_formed(student):
    _, words = student
    rows = load_file(SHIPPED / "shared" / "samples" / "lm.safetensors")
    assert rows["ids"].dtype == torch.int32 and len(rows["ids"]) == 32
    for ids, length in zip(rows["ids"].tolist(), rows["length"].tolist(), strict=True):
        assert ids[0] == words.bos and ids[length - 1] == words.eos
        assert set(ids[length:]) <= {words.pad}
        assert sum(words.image_begin == token or words.audio_begin == token for token in ids) == 1
