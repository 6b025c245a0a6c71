"""Golden inputs and reference outputs: what a bundle carries so that a device can check itself without PyTorch.

Every expected output comes from the libraries' own modules on the student's dequantised weights, never from the
captured graph, so the golden files are an independent oracle. runtimes/golden.py describes the files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from exporters.contents import ROUNDED, TIE_FACTOR
from exporters.families.reference_lm import streamed_reference
from exporters.families.references import REFERENCES
from exporters.noise import DTYPES, Floor, logit_noise, signal_noise
from exporters.program import Program
from exporters.student import Student

STEPS = 64
#: Name of the encoded signal in a decoder's golden file (runtimes/golden.py).
SIGNAL = "signal"
#: Samples of the language model; fewer where the vocabulary makes their logits larger than the limit.
SAMPLES, LARGEST_LOGITS = 8, 16 << 20
#: Tokens of the longest golden prompt; it ends where the cache does, if that is shorter.
LONGEST_PROMPT = 192
#: Positions that a cache must have beyond the steps.
SHORTEST_PROMPT = 8


def write_lm(
    student: Student, floating: Student | None, capacity: int, path: Path, precisions: Collection[str] = ()
) -> tuple[float, list[Floor]]:
    """Writes the language model's golden file.

    Args:
        floating: the float student, for the quantisation-loss gate; None leaves it out.
        precisions: those of exporters/noise.py's DTYPES whose noise floor is wanted.

    Returns:
        The noise of the float32 reference itself, the largest difference from its float64 logits as a share of the
        largest logit, and the floors.
    """
    ids, prompts = lm_samples(student, capacity)
    tensors = {"ids": ids, "prompt": prompts, "logits": _forced(streamed_reference(student), ids, prompts)}
    # Inputs that are rounded fall to either side of a tie, which float64 must show on every sample.
    counted = len(ids) if student.activations else 1
    precise = _forced(streamed_reference(student, torch.float64), ids[:counted], prompts[:counted])
    noise = np.abs(tensors["logits"][:1] - precise[:1]).max() / np.abs(precise[:1]).max()
    if floating is not None:
        tensors["float_logits"] = _forced(streamed_reference(floating), ids, prompts)
    _save(tensors, path)
    tie = TIE_FACTOR * noise * np.abs(tensors["logits"]).max()
    floors = []
    if student.activations:
        found = logit_noise(precise, tensors["logits"], tie)
        floors.append(Floor("lm", ROUNDED, found, precise.shape[0] * precise.shape[1]))
    for precision in precisions:
        moved = _forced(streamed_reference(student, DTYPES[precision]), ids, prompts)
        positions = moved.shape[0] * moved.shape[1]
        floors.append(Floor("lm", precision, logit_noise(tensors["logits"], moved, tie), positions))
    return float(noise), floors


def lm_samples(student: Student, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32 [n, L], prompt lengths int32 [n]) from the package's samples, else from a seeded generator.

    A sample shorter than prompt and steps together is continued by the next ones.
    """
    vocabulary = student.config["vocab_size"]
    count = max(2, min(SAMPLES, LARGEST_LOGITS // (4 * STEPS * vocabulary)))
    file = student.folder / "samples" / "lm.safetensors"
    if file.exists():
        held = load_file(file)
        rows = [row[:length].tolist() for row, length in zip(held["ids"], held["length"], strict=True)]
    else:
        rows = np.random.default_rng(0).integers(0, vocabulary, (count, STEPS)).tolist()
    # Prefills as short as the tasks' own (the first is what a benchmark times), one whose steps end with the cache,
    # and a lone first token. The long ones are fed in two chunks (runtimes/compare.py).
    longest = min(LONGEST_PROMPT, capacity - STEPS)
    prompts = [min(prompt, longest) for prompt in (8, longest, 1, 3, 4, 5, 6, 24)][:count]
    length = longest + STEPS
    ids = np.empty((count, length), np.int32)
    for i in range(count):
        chain = [token for j in range(len(rows)) for token in rows[(i * len(rows) // count + j) % len(rows)]]
        ids[i] = np.resize(np.array(chain, np.int32), length)
    return ids, np.array(prompts, np.int32)


@torch.no_grad()
def _forced(model: PreTrainedModel, ids: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Logits [n, STEPS, V] of one full forward pass per sample, without a cache."""
    rows = []
    for row, prompt in zip(ids, prompts, strict=True):
        kept = torch.arange(prompt - 1, prompt - 1 + STEPS)
        logits = model(torch.from_numpy(row)[None].long(), use_cache=False, logits_to_keep=kept).logits[0]
        rows.append(logits.float().numpy())
    return np.stack(rows)


def write_codec(
    student: Student,
    modality: str,
    programs: Mapping[str, Program],
    folder: Path,
    precisions: Mapping[str, Collection[str]] | None = None,
) -> tuple[dict[str, str], list[Floor]]:
    """Writes the golden files of a discretizer's encoder and decoder.

    Args:
        precisions: component -> those of exporters/noise.py's DTYPES whose noise floor is wanted, of decoders alone.

    Returns:
        component -> file name, and the floors.
    """
    model = student.discretizer(modality)
    reference = REFERENCES[type(model).__name__]
    written, floors = {}, []
    for component, program in programs.items():
        step = reference.decode if component.endswith("_decoder") else reference.encode
        [source], [target] = program.inputs, program.outputs
        tensors, expected, cases = {}, [], []
        for i, (case, signal) in enumerate(_cases(student, modality, model, component)):
            with torch.no_grad():
                expected.append(step(model, case).contiguous().numpy())
            cases.append(case)
            tensors |= {f"case{i}.{source.name}": case.numpy(), f"case{i}.expected.{target.name}": expected[-1]}
            if step is reference.decode:  # what was encoded: a lossy artifact is judged by how much further it is
                tensors[f"case{i}.{SIGNAL}"] = signal.numpy()
        written[component] = f"{component}.safetensors"
        _save(tensors, folder / written[component])
        if step is reference.decode:
            floors += _decoder_floors(
                student, modality, component, cases, expected, (precisions or {}).get(component, ())
            )
    return written, floors


@torch.no_grad()
def _decoder_floors(
    student: Student,
    modality: str,
    component: str,
    cases: Sequence[Tensor],
    expected: Sequence[np.ndarray],
    precisions: Collection[str],
) -> Iterator[Floor]:
    constants = student.modalities[modality].preprocessing
    span = 1.0 / min(constants["std"]) if "std" in constants else 1.0  # pixels of 0..1 become (pixel - mean) / std
    for precision in precisions:
        # As torch does it: diffusers' own method warns about modules that this one has not.
        model = nn.Module.to(student.discretizer(modality), DTYPES[precision])
        decode = REFERENCES[type(model).__name__].decode
        moved = [decode(model, case).float().contiguous().numpy() for case in cases]
        pairs = list(zip(expected, moved, strict=True))
        yield Floor(component, precision, signal_noise(modality, pairs, span))


def _cases(student: Student, modality: str, model: nn.Module, component: str) -> Iterator[tuple[Tensor, Tensor]]:
    """(input, signal) of a codec in three sizes; codes are those of real signals where the package has samples."""
    reference = REFERENCES[type(model).__name__]
    samples = package_samples(student, modality)
    for scale in reference.scales:
        signal = reference.signal(samples, student.modalities[modality], scale)
        if component.endswith("_encoder"):
            yield signal, signal
        else:
            with torch.no_grad():
                yield reference.encode(model, signal), signal


#: modality -> (file of a package's samples, tensor in it)
SAMPLE_FILES = {"image": ("images.safetensors", "images"), "audio": ("audio.safetensors", "recordings")}


def package_samples(student: Student, modality: str) -> Tensor | None:
    """The package's own real signals of a modality, None where it has none."""
    file, name = SAMPLE_FILES.get(modality, (f"{modality}.safetensors", modality))
    path = student.folder / "samples" / file
    held = load_file(path) if path.is_file() else {}
    return torch.from_numpy(held[name]) if name in held else None


def _save(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, path)
