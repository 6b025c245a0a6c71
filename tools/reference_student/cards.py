"""The model card, the data card and the recorded hashes of the splits."""

from pathlib import Path

from safetensors.numpy import load_file, save_file

from tools.reference_student.data import SPLITS

AIMS = {
    "text_to_image_sampled": 95,
    "text_to_image_greedy": 95,
    "image_to_text": 95,
    "text_to_audio_sampled": 85,
    "text_to_audio_greedy": 85,
    "audio_to_text": 85,
}
ALLOWED_LOSS = {"int8": 1.0, "int4": 3.0}
TASKS = {
    "text_to_image_sampled": "generated digit recognised (sampled)",
    "text_to_image_greedy": "generated digit recognised (greedy)",
    "text_to_audio_sampled": "generated speech recognised (sampled)",
    "text_to_audio_greedy": "generated speech recognised (greedy)",
    "image_to_text": "held-out image read",
    "audio_to_text": "held-out speech read",
}
ATTRIBUTION = """\
- MNIST test set, Y. LeCun and C. Cortes, CC BY-SA 3.0.
- Free Spoken Digit Dataset (FSDD), Z. Jackson and contributors, CC BY-SA 4.0.

The weights, the samples and the pictures derive from both, are offered under CC BY-SA 4.0, and
whoever passes them on keeps this attribution and the same licence.
"""


def verdicts(quality: dict) -> list[str]:
    """One sentence for each aim that was missed."""
    models, missed = quality["models"], []
    for task, aim in AIMS.items():
        reached = models["float"][task]
        if reached < aim:
            missed.append(f"{TASKS[task]}: float student {reached} %, aim {aim} %")
        for variant, allowed in ALLOWED_LOSS.items():
            loss = round(reached - models[variant][task], 1)
            if loss > allowed:
                missed.append(f"{TASKS[task]}: {variant} loses {loss} points, allowed {allowed:g}")
    return missed


def _table(quality: dict) -> str:
    models = quality["models"]
    lines = ["| % | aim | " + " | ".join(models) + " |", "| --- |" + " ---: |" * (len(models) + 1)]
    for task, label in TASKS.items():
        lines.append(
            f"| {label} | {AIMS[task]} | " + " | ".join(str(figures[task]) for figures in models.values()) + " |"
        )
    return "\n".join(lines)


def model_card(quality: dict) -> str:
    """MODEL_CARD.md from the measured figures."""
    signal, sampling, held_out = quality["discretizers"], quality["sampling"], quality["held_out"]
    missed = verdicts(quality)
    aims = (
        "All aims were met." if not missed else "Aims that were missed:\n\n" + "\n".join(f"- {line}" for line in missed)
    )
    return f"""\
# Reference student

A multimodal decoder small enough to ship with its toolchain: 1.45 M parameters (llama architecture,
4 layers, hidden size 192, 6 query and 2 key/value heads of 32, tied embeddings), over one vocabulary
of text, image codes and audio codes. It draws a handwritten digit, says a digit, and reads either
one. Distilled from a 2.7 M teacher of the same architecture; then both were tuned on the data, generation on its
most typical signals.
It exists so that an export can be checked end to end on something real; it knows ten digits and nothing else.

Variants: `float` (float16), `int8` (weight-only, per channel, symmetric; compressed-tensors
`int-quantized`), `int4` (GPTQ, groups of 32, asymmetric, `pack-quantized`; embedding and head 8 bit).

Discretizers: a diffusers `VQModel` (32x32 grey picture, 8x8 codes of 256) and a transformers
`DacModel` (0.64 s at 8 kHz, 20 frames of 4 codes of 256), stored in float16, computed in float32.

## Quality

Recognition is judged by two classifiers trained on real data only; reading is exact match of the
whole answer on {held_out["images"]} held-out images and {held_out["recordings"]} held-out recordings.
Sampling: temperature {sampling["temperature"]}, top-k {sampling["top_k"]}, {sampling["per_digit"]} generations of each
digit; greedy: 20 prompts for each digit.

{_table(quality)}

{aims}

| discretizers and judges on held-out data | |
| --- | ---: |
| image PSNR | {signal["image_psnr_db"]} dB |
| audio SI-SNR | {signal["audio_si_snr_db"]} dB |
| audio log-mel distance | {signal["audio_log_mel_distance"]} |
| image judge on real / reconstructed | {signal["judge_image_real"]} / {signal["judge_image_reconstructed"]} % |
| speech judge on real / reconstructed | {signal["judge_audio_real"]} / {signal["judge_audio_reconstructed"]} % |

The judges are not wholly independent of the generation figures: the last stage learnt to generate from those training
signals that the same judges, trained on the same recordings and pictures, were most sure of (half of the pictures,
70 % of the recordings; `tools/reference_student/typical.py`). The reading figures owe the judges nothing.

The audio codec spends 1 kbit/s and was trained on spectra, not on waveforms, so it keeps what is
said and not the phase: SI-SNR, which compares waveforms, is low by construction.

Measured by `{quality["command"]}`; all figures are in `quality.json`.

`pictures/digits.png`, a column for each digit: held-out, decoded, then two rows each of float, int8
and int4, sampled. `pictures/speech.png`: spectrograms of the even digits, held-out, decoded, float,
int8, int4.

## Use and limits

English prompts such as "a handwritten seven" or "say three". Voices are a mixture of the six
speakers of the data. Not for recognising digits in any real use.

## Licence and attribution

{ATTRIBUTION}"""


def data_card(work: Path) -> str:
    """DATA_CARD.md with the sizes of the splits."""
    arrays = load_file(work / "splits.safetensors")
    rows = "\n".join(
        f"| {split} | {len(arrays[f'{split}.images'])} | {len(arrays[f'{split}.recordings'])} |" for split in SPLITS
    )
    return f"""\
# Data

| split | MNIST images | FSDD recordings |
| --- | ---: | ---: |
{rows}

Images: the 10,000 of the MNIST test set, shuffled with a fixed seed. Recordings: indices 0-4 of each
speaker and digit are held out, 5 is for validation, the others train; the six speakers are in all
splits. A sample whose bytes occur in a stricter split is dropped from the looser one, and the first
eight bytes of every sample's SHA-256 are recorded beside the packages, so that the separation can be
checked. The judges were trained on the same training split, on real samples alone.

Images are padded from 28x28 to 32x32. Recordings are trimmed of silence (frames 30 dB below the
loudest, 20 ms kept on each side), cut or zero-padded to 5120 samples and scaled to a peak of 0.9.
Training augments: rotation, scale, shear and shift of images; speed, delay and faint noise of sounds.
Prompts are templates over the ten digit words and numerals.

`samples/` holds held-out material only: token sequences of the four tasks, ten images, five recordings.

## Licence and attribution

{ATTRIBUTION}"""


def write_hashes(work: Path, path: Path) -> None:
    """The content hashes of every split, uint64, as `{split}.{image,recording}_hashes`."""
    arrays = load_file(work / "splits.safetensors")
    save_file({name: value for name, value in arrays.items() if name.endswith("_hashes")}, path)
