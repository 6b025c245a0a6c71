"""What a build will make for a profile, what it leaves out and why, and whether the result can fit the device."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from device_profiles.schema import FORMS as KNOWN_FORMS
from device_profiles.schema import Profile
from exporters.backends import load_exporter
from exporters.errors import ExportError
from exporters.program import Program
from exporters.traffic import bytes_per_token, narrowest_input

#: What a process holds besides weights and cache: the interpreter, numpy and the vendor's runtime.
RUNTIME_BYTES = 96 << 20
#: Backends whose attention takes a cache of int8 codes with one step for each channel.
INT8_CACHES = ("onnx",)


class PlanError(ExportError):
    """The profile and the student do not go together."""


@dataclass(frozen=True)
class Entry:
    """One artifact that a profile asks for, as in "onnx/fused/exact", and why it is not made ("" when it is)."""

    component: str
    backend: str
    form: str
    mode: str
    left_out: str = ""

    @property
    def label(self) -> str:
        """``backend/form/mode``."""
        return f"{self.backend}/{self.form}/{self.mode}"


@dataclass(frozen=True)
class Forecast:
    """Predicted sizes in bytes, and tokens per second from the profile's bandwidth (None where that is unknown)."""

    bundle_bytes: int
    memory_bytes: int
    bytes_per_token: int | None
    tokens_per_second: float | None


def plan_entries(profile: Profile, program: Program, backends: Iterable[str] | None) -> tuple[Entry, ...]:
    """The profile's entries for a component in order of preference, each with the reason when it is left out.

    Raises:
        PlanError: none of them can be made.
        BackendMissing: the package of a backend that the profile names is not installed.
    """
    entries = []
    for label in profile.components.get(program.entry, ()):
        backend, form, mode = label.split("/")
        entries.append(
            Entry(program.entry, backend, form, mode, _left_out(profile, program, backends, backend, form, mode))
        )
    if all(entry.left_out for entry in entries):
        reasons = "; ".join(f"{e.label}: {e.left_out}" for e in entries) or "the profile lists no artifact for it"
        raise PlanError(
            f"nothing can be made for {program.entry} ({reasons})",
            where=f"profile {profile.name}",
            way_out="Choose another profile or other --backends.",
        )
    return tuple(entries)


def _left_out(
    profile: Profile, program: Program, backends: Iterable[str] | None, backend: str, form: str, mode: str
) -> str:
    if backends is not None and backend not in backends:
        return "not among --backends"
    if backend not in INT8_CACHES and any(state.dtype == "int8" for state in program.states):
        return "an int8 KV cache (quantise.kv_cache) is ONNX Runtime's alone in this version"
    if mode == "fast" and (bits := narrowest_input(program)) is not None and bits < 8:
        return f"a layer rounds its input to {bits} bits, and a fast mode would round it again"
    exporter = load_exporter(backend)
    if (form, mode) not in exporter.forms(program):
        return "float weights have no fast mode" if mode == "fast" else "this version has no such form"
    return "; ".join(exporter.unsupported(program, profile, (form, mode)))


def check_backends(names: Iterable[str]) -> tuple[str, ...]:
    """The backends asked for. Raises PlanError for one that nobody knows."""
    chosen = tuple(names)
    for name in chosen:
        if name not in KNOWN_FORMS:
            raise PlanError(
                f"unknown backend {name!r}", where="--backends", way_out=f"Known: {', '.join(KNOWN_FORMS)}."
            )
    return chosen


def forecast(
    profile: Profile,
    programs: Iterable[Program],
    golden_bytes: int,
    forms: Mapping[str, Collection[tuple[str, str]]] = MappingProxyType({}),
) -> Forecast:
    """Sizes from the weights' shapes and the state's, without reading a weight.

    Args:
        forms: component -> (backend, form) of every artifact, one where it is not named. Each backend writes the
            weights in files of its own, and the codes once more for each further form, which has them in another order.
    """
    weights = states = files = 0
    per_token = None
    for program in programs:
        own = sum(constant.nbytes for constant in program.constants.values())
        kinds = set(forms.get(program.entry, [("", "")]))
        backends = {backend for backend, _ in kinds}
        weights += own
        files += own * len(backends) + _code_bytes(program) * (len(kinds) - len(backends))
        states += sum(state_bytes(program))
        if (read := bytes_per_token(program)) is not None:
            per_token = read + sum(state_bytes(program)) // 2  # a cache that is half full
    rate = profile.bandwidth_bytes_per_s / per_token if profile.bandwidth_bytes_per_s and per_token else None
    return Forecast(files + golden_bytes, RUNTIME_BYTES + 2 * weights + states, per_token, rate)


def _code_bytes(program: Program) -> int:
    parts = (f"{name}.{part}" for name in program.inherited for part in ("codes", "scales", "zeros"))
    return sum(program.constants[name].nbytes for name in parts if name in program.constants)


def state_bytes(program: Program) -> Iterable[int]:
    """Bytes of each state."""
    for state in program.states:
        size = np.dtype(state.dtype).itemsize
        for dimension in state.shape:
            size *= dimension
        yield size


def check_fit(profile: Profile, prediction: Forecast) -> None:
    """Raises PlanError when the prediction is over the device's memory or the profile's budgets, naming both."""
    limits = (
        ("the bundle", prediction.bundle_bytes, profile.bundle_bytes, "bundle_bytes"),
        ("the process", prediction.memory_bytes, profile.rss_bytes, "rss_bytes"),
        ("the process", prediction.memory_bytes, profile.memory_visible_bytes, "memory_visible_bytes"),
    )
    for what, predicted, limit, key in limits:
        if limit is not None and predicted > limit:
            raise PlanError(
                f"{what} would take {predicted / 1e6:.1f} MB of {limit / 1e6:.1f} MB ({key})",
                where=f"profile {profile.name}",
                way_out="Use a smaller student, fewer bits, or a shorter context (--context).",
            )
