"""Golden files of a bundle: inputs and the reference outputs that the same student gave in PyTorch.

golden/lm: `ids` int32 [n, P + D], `prompt` int32 [n], `logits` float32 [n, D, V], optionally `float_logits` of the
same shape (the float student). Row j of sample i holds the logits after ids[i, :prompt[i] + j], teacher-forced.
golden/<component>: `caseN.<input>`, `caseN.expected.<output>` and, for a decoder, `caseN.signal`, whose codes the input
are; the last case has a shape never seen at export.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtimes.bundle import Artifact, Bundle
from runtimes.errors import Fault

Array = np.ndarray[Any, Any]
STEPS = 64


class GoldenError(Fault):
    """A golden file that is missing, or that does not hold what its gate needs."""


@dataclass(frozen=True)
class LmGolden:
    """Teacher-forced samples: shapes as in the module text."""

    ids: Array
    prompt: Array
    logits: Array
    float_logits: Array | None

    @property
    def steps(self) -> int:
        return int(self.logits.shape[1])

    def targets(self) -> Array:
        """int32 [n, D]: the token that comes next after each row of logits."""
        return np.take_along_axis(self.ids, self.prompt[:, None] + np.arange(self.steps), axis=1)


@dataclass(frozen=True)
class SignalCase:
    """One run of an encoder or decoder: feeds, the outputs expected and, for a decoder, the signal whose codes it gets
    (None in a bundle that has none)."""

    name: str
    feeds: Mapping[str, Array]
    expected: Mapping[str, Array]
    signal: Array | None = None


def load_lm(bundle: Bundle) -> LmGolden:
    """Raises GoldenError unless there are STEPS steps at two prompt lengths and every shape fits."""
    tensors, where = _load(bundle, "lm")
    missing = [name for name in ("ids", "prompt", "logits") if name not in tensors]
    if missing:
        raise GoldenError(f"holds no {missing[0]!r}", where, _AGAIN)
    golden = LmGolden(tensors["ids"], tensors["prompt"], tensors["logits"], tensors.get("float_logits"))
    shape = golden.logits.shape
    if golden.ids.ndim != 2 or len(shape) != 3 or golden.prompt.shape != shape[:1] or len(golden.ids) != shape[0]:
        raise GoldenError(
            f"ids {golden.ids.shape}, prompt {golden.prompt.shape}, logits {shape} do not fit", where, _AGAIN
        )
    if golden.float_logits is not None and golden.float_logits.shape != shape:
        raise GoldenError(f"float_logits {golden.float_logits.shape} do not fit logits {shape}", where, _AGAIN)
    if golden.steps < STEPS or len(np.unique(golden.prompt)) < 2:
        lengths = len(np.unique(golden.prompt))
        raise GoldenError(
            f"{golden.steps} steps at {lengths} prompt length(s); {STEPS} at two are needed", where, _AGAIN
        )
    if golden.prompt.min() < 1 or golden.prompt.max() + golden.steps > golden.ids.shape[1]:
        raise GoldenError("a prompt is longer than its ids allow", where, _AGAIN)
    return golden


def load_cases(bundle: Bundle, artifact: Artifact) -> list[SignalCase]:
    """The cases of an encoder or decoder, in order. Raises GoldenError unless there are two and none lacks a tensor."""
    tensors, where = _load(bundle, artifact.component)
    names = sorted({name.split(".")[0] for name in tensors}, key=lambda name: int(name.removeprefix("case") or -1))
    if len(names) < 2:
        raise GoldenError(f"{len(names)} case(s); two shapes are needed", where, _AGAIN)
    cases = []
    for case in names:
        feeds = {spec.name: tensors.get(f"{case}.{spec.name}") for spec in artifact.inputs}
        expected = {spec.name: tensors.get(f"{case}.expected.{spec.name}") for spec in artifact.outputs}
        held = {name: tensor for name, tensor in {**feeds, **expected}.items() if tensor is not None}
        if len(held) != len(feeds) + len(expected):
            lacking = sorted({*feeds, *expected} - set(held))
            raise GoldenError(f"{case} holds no {lacking[0]!r}", where, _AGAIN)
        signal = tensors.get(f"{case}.signal")
        cases.append(SignalCase(case, {n: held[n] for n in feeds}, {n: held[n] for n in expected}, signal))
    return cases


def load_feeds(bundle: Bundle, artifact: Artifact) -> dict[str, Array]:
    """The feeds of an artifact's first golden run (for lm: the first prompt), read without the reference outputs."""
    if artifact.component == "lm":
        tensors, _ = _load(bundle, "lm", ("ids", "prompt"))
        return {"ids": tensors["ids"][:1, : int(tensors["prompt"][0])].copy()}
    names = {spec.name: f"case0.{spec.name}" for spec in artifact.inputs}
    tensors, _ = _load(bundle, artifact.component, tuple(names.values()))
    return {name: tensors[key] for name, key in names.items()}


_AGAIN = "Make the bundle again with exporters.build"


def _load(bundle: Bundle, component: str, names: tuple[str, ...] = ()) -> tuple[dict[str, Array], str]:
    """The named tensors of a component's golden file (all of them without names), and its path for messages."""
    from safetensors import SafetensorError, safe_open

    path = bundle.golden.get(component)
    if path is None:
        raise GoldenError(f"no golden file for {component}", str(bundle.folder), _AGAIN)
    try:
        with safe_open(bundle.file(path), "numpy") as file:
            return {name: file.get_tensor(name) for name in names or file.keys()}, path
    except (SafetensorError, OSError) as error:
        raise GoldenError(f"cannot be read ({error})", path, _AGAIN) from error
