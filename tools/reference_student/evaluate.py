"""Step `evaluate`: what the teacher, the float student, int8 and int4 can do, as judged by classifiers of real data.

Writes `work/quality.json`, keeping the figures of models that this run does not measure. Every figure is
a share of held-out or generated samples, in percent.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from tools.reference_student import audio_codec, generation, image_codec, judges, lm, teacher, tokens, vocabulary
from tools.reference_student.data import audio_batch, image_batch, load_split
from tools.reference_student.generation import GREEDY, SAMPLED, Sampling
from tools.reference_student.quantize import dequantized
from tools.reference_student.training import arguments

COMMAND = "python -m tools.reference_student.evaluate"
MODELS = ("teacher", "float", "int8", "int4")
PER_DIGIT = 20


def load_model(work: Path, name: str, words: vocabulary.Vocabulary) -> LlamaForCausalLM:
    """The teacher, or the student with the weights that package `name` stands for; float32, eval mode."""
    if name == "teacher":
        return teacher.load(work, "tune")
    model = lm.student(words)
    model.load_state_dict(dequantized(torch.load(work / f"quantized_{name}.pt", weights_only=True), name))
    return model.eval()


def ask(words: vocabulary.Vocabulary, kind: str, count: int) -> tuple[list[list[int]], list[int]]:
    """Prompts `<bos> text <image>`, `count` for each digit over all phrasings, and the digits asked for."""
    templates = vocabulary.IMAGE_PROMPTS if kind == "image" else vocabulary.AUDIO_PROMPTS
    begin = words.image_begin if kind == "image" else words.audio_begin
    rows, digits = [], []
    for digit in range(10):
        texts = vocabulary.prompts(templates, digit)
        for number in range(count):
            # 37 is coprime to the number of phrasings, so the walk meets words, numerals and all templates.
            rows.append([words.bos, *words.encode(texts[number * 37 % len(texts)]), begin])
            digits.append(digit)
    return rows, digits


class Bench:
    """The discretizers, judges and held-out codes that every model is measured with."""

    def __init__(self, work: Path) -> None:
        self.work, self.words = work, vocabulary.load(work / "tokenizer")
        self.image, self.audio = image_codec.load(work), audio_codec.load(work)
        self.codes = tokens.load(work)

    @torch.no_grad()
    def pictures(self, ids: torch.Tensor) -> torch.Tensor:
        """Generated ids [n,64] -> pixels float [n,32,32] in 0..1."""
        output = image_codec.decode(self.image, generation.image_codes(self.words, ids))
        return (output[:, 0] * image_codec.STD + image_codec.MEAN).clamp(0, 1)

    @torch.no_grad()
    def sounds(self, ids: torch.Tensor) -> torch.Tensor:
        """Generated ids [n,80] -> samples float [n,5120]."""
        return audio_codec.decode(self.audio, generation.audio_codes(self.words, ids))

    def recognised(self, model: LlamaForCausalLM, kind: str, sampling: Sampling, count: int) -> float:
        """Share of generated pictures or sounds in which the judge finds the digit that was asked for."""
        rows, digits = ask(self.words, kind, count)
        ids = generation.generate_any(model, self.words, rows, kind, sampling)
        if kind == "image":
            found = judges.image_digits(self.pictures(ids).numpy(), self.work / "judges")
        else:
            found = judges.spoken_digits(self.sounds(ids).numpy(), self.work / "judges")
        return float((torch.from_numpy(found) == torch.tensor(digits)).float().mean())

    def read(self, model: LlamaForCausalLM, kind: str, split: str = "held_out") -> float:
        """Share of real samples whose digit the model writes, exactly and followed by eos, decoding greedily."""
        codes = self.codes[f"{split}.{kind}.plain"][0]
        rows = [[self.words.bos, *lm.wrapped(self.words, kind, row)] for row in codes]
        made = generation.generate_any(model, self.words, rows, "text")
        labels = self.codes[f"{split}.{kind}.labels"].tolist()
        answers = [[*self.words.encode(vocabulary.WORDS[label]), self.words.eos] for label in labels]
        return sum(row[: len(answer)] == answer for row, answer in zip(made.tolist(), answers, strict=True)) / len(
            labels
        )


def percent(share: float) -> float:
    """Rounded to a tenth of a percent."""
    return round(100 * share, 1)


def model_quality(bench: Bench, model: LlamaForCausalLM, count: int) -> dict[str, float]:
    """The six figures of one model, in percent."""
    return {
        "text_to_image_sampled": percent(bench.recognised(model, "image", SAMPLED, count)),
        "text_to_image_greedy": percent(bench.recognised(model, "image", GREEDY, 20)),
        "text_to_audio_sampled": percent(bench.recognised(model, "audio", SAMPLED, count)),
        "text_to_audio_greedy": percent(bench.recognised(model, "audio", GREEDY, 20)),
        "image_to_text": percent(bench.read(model, "image")),
        "audio_to_text": percent(bench.read(model, "audio")),
    }


@torch.no_grad()
def signal_quality(bench: Bench) -> dict[str, float]:
    """Reconstruction of held-out samples by the discretizers, and the judges on real and on reconstructed ones."""
    data = load_split(bench.work, "held_out")
    pixels, sounds = torch.from_numpy(image_batch(data.images)), torch.from_numpy(audio_batch(data.recordings))
    seen = image_codec.decode(
        bench.image, image_codec.encode(bench.image, (pixels - image_codec.MEAN) / image_codec.STD)
    )
    seen = (seen[:, 0] * image_codec.STD + image_codec.MEAN).clamp(0, 1)
    heard = audio_codec.decode(bench.audio, audio_codec.encode(bench.audio, sounds))
    real = judges.accuracy(bench.work, "held_out", bench.work / "judges")
    return {
        "image_psnr_db": round(image_codec.psnr(bench.image, pixels), 2),
        "audio_si_snr_db": round(audio_codec.si_snr(bench.audio, sounds), 2),
        "audio_log_mel_distance": round(float(audio_codec.spectral_distance(heard, sounds[:, 0])), 3),
        "judge_image_real": percent(real["image"]),
        "judge_audio_real": percent(real["audio"]),
        "judge_image_reconstructed": percent(
            float((judges.image_digits(seen.numpy(), bench.work / "judges") == data.image_labels).mean())
        ),
        "judge_audio_reconstructed": percent(
            float((judges.spoken_digits(heard.numpy(), bench.work / "judges") == data.recording_labels).mean())
        ),
    }


def main() -> None:
    """Measure and write `work/quality.json`."""
    options = arguments(
        __doc__,
        models={"nargs": "+", "default": list(MODELS), "choices": MODELS},
        signals={"action": argparse.BooleanOptionalAction, "default": True, "help": "measure the discretizers too"},
        per_digit={"type": int, "default": PER_DIGIT, "help": "sampled generations of each digit"},
    )
    bench, path = Bench(options.work), options.work / "quality.json"
    signals = signal_quality(bench) if options.signals else None
    figures = {}
    for name in options.models:
        figures[name] = model_quality(bench, load_model(options.work, name, bench.words), options.per_digit)
        print(name, json.dumps(figures[name]), flush=True)
    known = json.loads(path.read_text()) if path.exists() else {"discretizers": {}, "models": {}}
    models = {**known["models"], **figures}
    quality = {
        "command": COMMAND,
        "unit": "percent unless the name says dB",
        "sampling": {"temperature": SAMPLED.temperature, "top_k": SAMPLED.top_k, "per_digit": options.per_digit},
        "held_out": {
            "images": len(bench.codes["held_out.image.labels"]),
            "recordings": len(bench.codes["held_out.audio.labels"]),
        },
        "discretizers": signals or known["discretizers"],
        "models": {name: models[name] for name in MODELS if name in models},
    }
    path.write_text(json.dumps(quality, indent=2) + "\n")
    print(json.dumps(quality["discretizers"]))


if __name__ == "__main__":
    main()
