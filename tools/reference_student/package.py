"""Step `package`: write the shipped result and prove that each variant assembles.

The student (`shared/` plus one folder for each variant) goes where `exporters.reference` looks for it; the
judges and the hashes of the splits, which no export needs, to `package/` beside this file.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from exporters.package import write_manifest
from tools.reference_student import (
    assemble,
    audio_codec,
    cards,
    image_codec,
    judges,
    lm,
    pictures,
    quantize,
    tokens,
    vocabulary,
)
from tools.reference_student.data import PEAK, SAMPLE_RATE, SAMPLES, load_split
from tools.reference_student.training import arguments

VERSION, LICENSE = "1.0.0", "CC-BY-SA-4.0"
SAMPLE_ROWS = 8


def modalities(words: vocabulary.Vocabulary) -> dict[str, dict]:
    """The modality table of package.json."""
    return {
        "text": {"tokens": [0, vocabulary.TEXT]},
        "image": {
            "tokens": [words.image_first, words.audio_first],
            "codebooks": 1,
            "codebook_size": image_codec.CODEBOOK,
            "grid": [image_codec.GRID, image_codec.GRID],
            "begin": "<image>",
            "end": "</image>",
            "discretizer": "discretizers/image",
        },
        "audio": {
            "tokens": [words.audio_first, words.size],
            "codebooks": audio_codec.CODEBOOKS,
            "codebook_size": audio_codec.CODEBOOK,
            "grid": [audio_codec.FRAMES, audio_codec.CODEBOOKS],
            "begin": "<audio>",
            "end": "</audio>",
            "discretizer": "discretizers/audio",
        },
    }


def write_json(path: Path, value: dict) -> None:
    """Indented JSON with a final newline; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def _half(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: value.half().contiguous() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }


def write_discretizers(work: Path, folder: Path) -> None:
    """Both discretizers with float16 weights and the preprocessing constants, which live in no other place."""
    image, audio = image_codec.load(work), audio_codec.load(work)
    image_config = {
        "_class_name": "VQModel",
        **{name: value for name, value in image.config.items() if not name.startswith("_")},
    }
    image_config["preprocessing"] = {
        "size": [32, 32],
        "channels": 1,
        "mean": [image_codec.MEAN],
        "std": [image_codec.STD],
    }
    audio_config = audio.config.to_dict()
    audio_config["preprocessing"] = {"sample_rate": SAMPLE_RATE, "samples": SAMPLES, "channels": 1, "peak": PEAK}
    for name, config, model in (("image", image_config, image), ("audio", audio_config, audio)):
        write_json(folder / name / "config.json", {**config, "student_version": VERSION})
        save_file(_half(model), folder / name / "model.safetensors", metadata={"format": "pt"})


def write_samples(work: Path, words: vocabulary.Vocabulary, folder: Path) -> None:
    """Held-out sequences over the four tasks, pictures and recordings, for calibration and golden inputs."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays, rows = tokens.load(work), []
    for kind, templates in (("image", vocabulary.IMAGE_PROMPTS), ("audio", vocabulary.AUDIO_PROMPTS)):
        codes, labels = arrays[f"held_out.{kind}.plain"][0], arrays[f"held_out.{kind}.labels"].tolist()
        for number in range(SAMPLE_ROWS * 2):
            place = number * 17 % len(labels)
            body, digit = lm.wrapped(words, kind, codes[place]), labels[place]
            if number % 2:
                rows.append([words.bos, *body, *words.encode(vocabulary.WORDS[digit]), words.eos])
            else:
                texts = vocabulary.prompts(templates, digit)
                rows.append([words.bos, *words.encode(texts[number * 5 % len(texts)]), *body, words.eos])
    ids = torch.full((len(rows), max(map(len, rows))), words.pad, dtype=torch.int32)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row, dtype=torch.int32)
    save_file(
        {"ids": ids, "length": torch.tensor([len(row) for row in rows], dtype=torch.int32)}, folder / "lm.safetensors"
    )
    data = load_split(work, "held_out")
    pictures_of = [int((data.image_labels == digit).nonzero()[0][0]) for digit in range(10)]
    sounds_of = [int((data.recording_labels == digit).nonzero()[0][2]) for digit in (0, 2, 3, 5, 7)]
    save_file(
        {"images": torch.from_numpy(data.images[pictures_of]), "labels": torch.arange(10)},
        folder / "images.safetensors",
    )
    save_file(
        {
            "recordings": torch.from_numpy(data.recordings[sounds_of]),
            "labels": torch.from_numpy(data.recording_labels[sounds_of]),
        },
        folder / "audio.safetensors",
    )


def write_model(work: Path, model: LlamaForCausalLM, variant: str, folder: Path) -> None:
    """config.json, generation_config.json and the weights in two shards with their index."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        **model.config.to_dict(),
        "dtype": "float16",
        "student_version": VERSION,
    }
    if variant != "float":
        config["quantization_config"] = quantize.config(variant)
    write_json(folder / "config.json", config)
    special = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", {**special, "do_sample": True, "temperature": 0.8, "top_k": 50})
    tensors = torch.load(work / f"quantized_{variant}.pt", weights_only=True)
    total = sum(value.nbytes for value in tensors.values())
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    # Embedding and the first layers, then the rest; a module's tensors stay in one shard.
    for name in sorted(tensors):
        late = (
            any(name.startswith(f"model.layers.{layer}.") for layer in range(1, model.config.num_hidden_layers))
            or name == "model.norm.weight"
        )
        shards[int(late)][name] = tensors[name]
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))},
    )


def write_evidence(work: Path, output: Path) -> None:
    """Write `output` anew: the judges' weights and the hashes of the splits."""
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(work / "judges", output / "judges", copy_function=shutil.copyfile)
    cards.write_hashes(work, output / "splits.safetensors")


def write_student(work: Path, output: Path) -> None:
    """Write `output` anew: shared/, float/, int8/ and int4/."""
    words = vocabulary.load(work / "tokenizer")
    model = lm.student(words)
    shutil.rmtree(output, ignore_errors=True)
    shared = output / "shared"
    vocabulary.write(words.tokenizer, shared / "tokenizer", VERSION)
    write_discretizers(work, shared / "discretizers")
    write_samples(work, words, shared / "samples")
    quality = json.loads((work / "quality.json").read_text())
    write_json(shared / "quality.json", quality)
    pictures.write(work, shared / "pictures")
    (shared / "MODEL_CARD.md").write_text(cards.model_card(quality))
    (shared / "DATA_CARD.md").write_text(cards.data_card(work))
    for variant in assemble.VARIANTS:
        write_model(work, model, variant, output / variant)
        with tempfile.TemporaryDirectory() as scratch:
            whole = assemble.assemble(variant, Path(scratch) / variant, output)
            write_manifest(whole, f"reference-student-{variant}", VERSION, LICENSE, modalities(words))
            shutil.copyfile(whole / "package.json", output / variant / "package.json")


def main() -> None:
    """Write the shipped packages and print their sizes."""
    options = arguments(
        __doc__,
        output={"type": Path, "default": assemble.SHIPPED, "help": "where the student goes; replaced as a whole"},
        evidence={
            "type": Path,
            "default": judges.SHIPPED.parent,
            "help": "where the judges and hashes go; replaced as a whole",
        },
    )
    write_evidence(options.work, options.evidence)
    write_student(options.work, options.output)
    total = 0
    for folder in (options.evidence, *sorted(options.output.iterdir())):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        total += size
        print(f"{folder.name}: {size / 1e6:.2f} MB")
    print(f"in all {total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
