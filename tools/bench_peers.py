"""Speed against plain ONNX Runtime: torch.onnx.export of the same student, in one interleaved run.

    python -m tools.bench_peers BUNDLE --package DIR [--threads N] [--rounds N] [--output FILE]

The peer is what a user would have done without this project: the libraries' own modules with float32 weights through
torch.onnx.export(dynamo=True), the KV cache as growing inputs and outputs, handed from step to step as OrtValues so
that it is not copied either. In every round each contender has its turn, warm: a call that is not timed, then several
that are. Figures are medians over the rounds and ratios are taken within one run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from exporters.families.audio_codec import reference_decode as decode_audio
from exporters.families.decoder_lm import build_reference
from exporters.families.image_vq import reference_decode as decode_image
from exporters.student import Student, load_student
from runtimes.bundle import Bundle, load_bundle
from runtimes.host import cpu_model, usable_cores
from runtimes.session import open_session

PROMPT, PREFILL, STEPS = 8, 64, 64
#: Calls of a prefill or a decoder that are timed in one turn.
CALLS = 5
PEER = "torch.onnx.export"

#: One timed run of a contender, in seconds.
Run = Callable[[], float]


class PlainLanguageModel(nn.Module):
    """``forward(ids, *past) -> (logits of the newest token, *present)``, the cache growing by concatenation."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        return logits, *(t for layer in cache.layers for t in (layer.keys, layer.values))


class PlainDecoder(nn.Module):
    """A discretizer's own way from codes to the signal."""

    def __init__(self, model: nn.Module, decode: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self._decode = model, decode

    def forward(self, codes: Tensor) -> Tensor:
        return self._decode(self.model, codes)


class PlainSession:
    """The peer's language model in ONNX Runtime; past and present stay OrtValues."""

    def __init__(self, path: Path, options: onnxruntime.SessionOptions, empty: tuple[int, ...]) -> None:
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._inputs = [item.name for item in self._session.get_inputs()]
        self._outputs = [item.name for item in self._session.get_outputs()]
        self._empty = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(empty, np.float32))
        self.reset()

    def reset(self) -> None:
        """Empties the cache."""
        self._past = [self._empty] * (len(self._inputs) - 1)

    def run(self, ids: np.ndarray) -> np.ndarray:
        """Logits [1, V] of the newest token."""
        binding = self._session.io_binding()
        binding.bind_cpu_input(self._inputs[0], ids)
        for name, value in zip(self._inputs[1:], self._past, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        logits, *self._past = binding.get_outputs()
        return logits.numpy()


def export_peer(module: nn.Module, examples: tuple[Tensor, ...], dynamic: Any, path: Path) -> Path:
    """torch.onnx.export with its defaults."""
    with torch.no_grad():
        torch.onnx.export(module.eval(), examples, str(path), dynamo=True, dynamic_shapes=dynamic, verbose=False)
    return path


def export_peer_lm(student: Student, path: Path) -> tuple[Path, tuple[int, ...]]:
    """The peer's model file and the shape of an empty cache tensor."""
    model = build_reference(student)
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    past = tuple(torch.zeros(1, config.num_key_value_heads, 5, width) for _ in range(2 * config.num_hidden_layers))
    dynamic = ({1: torch.export.Dim.DYNAMIC}, tuple({2: torch.export.Dim.DYNAMIC} for _ in past))
    ids = torch.zeros(1, 3, dtype=torch.int64)
    return export_peer(PlainLanguageModel(model), (ids, *past), dynamic, path), (*past[0].shape[:2], 0, width)


def timed(action: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def warm(action: Callable[[], Any]) -> float:
    """Seconds of one call when the ones before it were the same."""
    action()
    return timed(lambda: [action() for _ in range(CALLS)]) / CALLS


def lm_runs(
    reset: Callable[[], None], step: Callable[[np.ndarray], Any], vocabulary: int, dtype: type
) -> dict[str, Run]:
    """Task -> run of one language model: seconds a decoded token, seconds a prefill."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (1, PREFILL + STEPS)).astype(dtype)
    singles = [np.ascontiguousarray(ids[:, i : i + 1]) for i in range(STEPS)]

    def decode() -> float:
        reset()
        step(ids[:, :PROMPT].copy())
        return timed(lambda: [step(single) for single in singles]) / STEPS

    def one_prefill() -> None:
        reset()
        step(ids[:, :PREFILL].copy())

    def prefill() -> float:
        return warm(one_prefill)

    return {"lm decode, per token": decode, f"lm prefill of {PREFILL}": prefill}


def our_runs(bundle: Bundle, threads: int, stack: ExitStack) -> dict[str, dict[str, Run]]:
    """Task -> contender -> run, for every form and mode of the bundle's artifacts."""
    runs: dict[str, dict[str, Run]] = {}
    for artifact in bundle.artifacts:
        if artifact.component != "lm" and not artifact.component.endswith("_decoder"):
            continue
        session = stack.enter_context(open_session(bundle, artifact, threads))
        if artifact.component == "lm":
            mine = lm_runs(session.reset, lambda ids, s=session: s.run({"ids": ids}), bundle.vocab_size, np.int32)
        else:
            feeds = {"codes": example_codes(bundle, artifact.component).astype(np.int32)}
            mine = {artifact.component: lambda s=session, f=feeds: warm(lambda: s.run(f))}
        for task, run in mine.items():
            runs.setdefault(task, {})[artifact.label] = run
    return runs


def example_codes(bundle: Bundle, component: str) -> np.ndarray:
    """Random codes of one signal: [1, h, w] for an image, [1, K, T] for audio."""
    modality = bundle.modalities[component.split("_")[0]]
    shape = modality.grid if modality.codebooks == 1 else (modality.codebooks, *modality.grid[:-1])
    return np.random.default_rng(0).integers(0, modality.codebook_size, (1, *shape))


def peer_runs(student: Student, bundle: Bundle, threads: int, folder: Path) -> dict[str, Run]:
    """Task -> the peer's run."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    path, empty = export_peer_lm(student, folder / "lm.onnx")
    session = PlainSession(path, options, empty)
    runs = lm_runs(session.reset, session.run, bundle.vocab_size, np.int64)
    for name, decode, axis in (("image", decode_image, 0), ("audio", decode_audio, 2)):
        component = f"{name}_decoder"
        if name not in bundle.modalities:
            continue
        codes = example_codes(bundle, component)
        example = torch.from_numpy(np.concatenate([codes, codes], axis))
        dynamic = ({axis: torch.export.Dim.DYNAMIC},)
        module = PlainDecoder(student.discretizer(name), decode)
        path = export_peer(module, (example,), dynamic, folder / f"{component}.onnx")
        plain = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feeds = {plain.get_inputs()[0].name: codes}
        runs[component] = lambda p=plain, f=feeds: warm(lambda: p.run(None, f))
    return runs


def interleave(runs: Mapping[str, Mapping[str, Run]], rounds: int) -> dict[str, dict[str, float]]:
    """Task -> contender -> median seconds; every round runs each contender once, after a warm-up round."""
    seconds: dict[str, dict[str, list[float]]] = {task: {name: [] for name in row} for task, row in runs.items()}
    for index in range(rounds + 1):
        for task, row in runs.items():
            for name, run in row.items():
                value = run()
                if index:
                    seconds[task][name].append(value)
    return {task: {name: statistics.median(v) for name, v in row.items()} for task, row in seconds.items()}


def print_table(medians: Mapping[str, Mapping[str, float]]) -> None:
    """Median milliseconds and how many times faster than the peer."""
    table = Table("task", "contender", "median ms", "times the peer's speed", title="Interleaved", title_justify="left")
    for task, row in medians.items():
        for name, seconds in row.items():
            table.add_row(task, name, f"{1e3 * seconds:.3f}", f"{row[PEER] / seconds:.2f}")
    Console().print(table)


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Interleaved speed against torch.onnx.export in ONNX Runtime.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--package", type=Path, required=True, help="the student that the bundle was built from")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    bundle, student = load_bundle(options.bundle), load_student(options.package)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        runs = our_runs(bundle, options.threads, stack)
        for task, run in peer_runs(student, bundle, options.threads, Path(folder)).items():
            runs[task][PEER] = run
        medians = interleave(runs, options.rounds)
    print_table(medians)
    if options.output:
        versions = {name: metadata.version(name) for name in ("onnxruntime", "torch", "transformers", "diffusers")}
        report = {
            "command": f"python -m tools.bench_peers BUNDLE --package DIR --threads {options.threads} "
            f"--rounds {options.rounds}",
            "date": time.strftime("%Y-%m-%d"),
            "student": f"{bundle.student.name} {bundle.student.version}",
            "machine": f"{cpu_model()}, {usable_cores()} cores, Python {platform.python_version()}",
            "versions": versions,
            "median_seconds": medians,
        }
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
