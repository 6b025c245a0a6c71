"""Session: one loaded artifact, and the input checks that every backend shares.

A language-model session holds its KV cache: `run({"ids": int32 [1, S]})` appends S tokens and returns the logits of
the last one. Every other session is a pure function of its feeds. Returned arrays are views that the next `run`
overwrites.

A backend subclasses `CheckedSession` and writes `_run`, `_reset`, `_close` and the classmethod `open`; it never sees
an input that the artifact's signature does not allow. Memory layout and byte order of inputs: a non-contiguous array
is a layout and is copied; a byte-swapped array is another dtype and is refused, as is every other dtype.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import numpy as np

from runtimes.errors import Fault
from runtimes.versions import check_runtime

if TYPE_CHECKING:
    from runtimes.bundle import Artifact, Bundle, TensorSpec

Array = np.ndarray[Any, Any]
_Outputs = TypeVar("_Outputs")


class RuntimeInputError(Fault):
    """A feed that the artifact's signature does not allow; the session is unchanged and can go on."""


class KvOverflow(RuntimeInputError):
    """More tokens than the KV cache holds."""


class SessionClosed(Fault):
    """The session was used after `close`."""


class SessionBusy(Fault):
    """The session was entered by a second thread while a first one was inside."""


class OutOfDeviceMemory(Fault):
    """The backend could not allocate what this step needs."""


class BackendUnavailable(Fault):
    """No such backend, or its package is not installed on this device."""


class Session(Protocol):
    """A loaded artifact. `position` and `capacity` count tokens; both are 0 for an artifact without a KV cache."""

    position: int
    capacity: int

    def reset(self) -> None:
        """Empties the KV cache."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """One step. Raises RuntimeInputError, SessionClosed, SessionBusy, OutOfDeviceMemory."""

    def close(self) -> None:
        """Releases the model. A second call does nothing."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True)
class Limits:
    """What a signature does not say: the KV capacity in tokens (0 = no cache), and for each integer input the
    exclusive upper bound of its values (vocabulary or codebook size)."""

    capacity: int = 0
    high: Mapping[str, int] = field(default_factory=dict)


def limits_of(bundle: Bundle, artifact: Artifact) -> Limits:
    """The limits of an artifact, from the manifest's vocabulary, context and codebooks."""
    if artifact.component == "lm":
        return Limits(bundle.context, {"ids": bundle.vocab_size})
    modality = bundle.modalities.get(artifact.component.split("_")[0])
    if modality is None or not any(spec.name == "codes" for spec in artifact.inputs):
        return Limits()
    return Limits(0, {"codes": modality.codebook_size})


class CheckedSession(ABC):
    """The checks, the bookkeeping of positions and the guards; a backend adds the run itself.

    `run` costs a few microseconds for a one-token step: a step of a small model takes 500.
    `effective` is what the loaded model computes in, as the vendor's runtime reports it, where it reports that.
    `stand_in` names what runs in the device's place, such as an interpreter or an emulator; None on the device itself.
    `lengths` are the runs of tokens that the model is compiled for; empty where it takes any.
    `candidates` is how many of the largest logits of a range `run_top` gives; 0 where the model has no such head.
    With `timing`, a backend stores the seconds of its vendor's own call in `last_run_seconds`, so that the cost of
    everything around it can be measured.
    """

    def __init__(self, artifact: Artifact, limits: Limits, *, timing: bool = False) -> None:
        self.artifact = artifact
        self.capacity = limits.capacity
        self.position = 0
        self.timing = timing
        self.last_run_seconds = 0.0
        self.effective: dict[str, str] = {}
        self.stand_in: str | None = None
        self.lengths: tuple[int, ...] = ()
        self.candidates = 0
        self._where = f"{artifact.component} ({artifact.backend} {artifact.form} {artifact.mode})"
        self._checks = tuple(
            _InputCheck(spec, limits.high.get(spec.name), self._where)
            for spec in artifact.inputs
            if spec.name != "last"
        )
        self._vocabulary = limits.high.get("ids", 0)
        self._last = np.zeros(1, np.int32) if any(spec.name == "last" for spec in artifact.inputs) else None
        self._guard = threading.Lock()
        self._closed = False

    @classmethod
    @abstractmethod
    def open(cls, bundle: Bundle, artifact: Artifact, *, threads: int | None = None, timing: bool = False) -> Self:
        """Loads the artifact's files out of the bundle."""

    @abstractmethod
    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """The backend's step on checked, C-contiguous feeds ("last" included when the artifact has it).
        `self.position` is the number of tokens held before this step."""

    @abstractmethod
    def _reset(self) -> None:
        """Forgets the KV cache; the base class sets `position` to 0."""

    @abstractmethod
    def _close(self) -> None:
        """Releases the vendor's objects."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return self._guarded(feeds, self._run)

    def run_top(self, feeds: Mapping[str, Array], first: int, end: int) -> tuple[Array, Array]:
        """One step of a model whose head picks by itself: only its candidates leave the device.

        Args:
            first, end: the range of token ids, a modality's or a codebook's.

        Returns:
            Logits float32 and token ids int32 of the `candidates` largest (fewer in a shorter range), largest first.

        Raises:
            RuntimeInputError: there is no such head, or no such range; and what `run` raises.
        """
        if not 0 <= first < end <= self._vocabulary or not self.candidates:
            what = f"rows {first}..{end - 1} of {self._vocabulary}" if self.candidates else "the model has no such head"
            raise RuntimeInputError(what, self._where, "Use run")
        values, ids = self._guarded(feeds, lambda checked: self._run_top(checked, first, end))
        found = min(self.candidates, end - first)
        return values[:found], ids[:found]

    def _run_top(self, feeds: dict[str, Array], first: int, end: int) -> tuple[Array, Array]:
        """The backend's step of `run_top`: logits [candidates] and ids [candidates]."""
        raise RuntimeInputError("the model has no such head", self._where, "Use run")

    def _guarded(self, feeds: Mapping[str, Array], step: Callable[[dict[str, Array]], _Outputs]) -> _Outputs:
        """One checked step, which only one thread at a time may take."""
        if not self._guard.acquire(blocking=False):
            raise self._busy()
        try:
            if self._closed:
                raise SessionClosed("the session is closed", self._where, "Open a new one with open_session")
            checked = self._check(feeds)
            if not self.capacity:
                return step(checked)
            length = self._admit(checked["ids"].shape[-1])
            outputs = step(checked | {"last": self._last} if self._last is not None else checked)
            self.position += length
            return outputs
        except MemoryError as error:
            raise OutOfDeviceMemory(
                "out of memory in a step", self._where, "Use a smaller batch or a shorter input"
            ) from error
        finally:
            self._guard.release()

    def reset(self) -> None:
        if not self._guard.acquire(blocking=False):
            raise self._busy()
        try:
            if self._closed:
                raise SessionClosed("the session is closed", self._where, "Open a new one with open_session")
            self._reset()
            self.position = 0
        finally:
            self._guard.release()

    def close(self) -> None:
        if not self._guard.acquire(blocking=False):
            raise self._busy()
        try:
            if not self._closed:
                self._closed = True
                self._close()
        finally:
            self._guard.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _busy(self) -> SessionBusy:
        return SessionBusy(
            "another thread is inside this session", self._where, "Give each thread its own session, or use a lock"
        )

    def _check(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        checked: dict[str, Array] = {}
        symbols: dict[str, int] = {}
        for check in self._checks:
            checked[check.name] = check(feeds.get(check.name), symbols)
        if len(feeds) != len(checked):
            unknown = sorted(set(feeds) - set(checked))
            known = ", ".join(check.name for check in self._checks)
            raise RuntimeInputError(f"unknown input {unknown[0]!r}", self._where, f"This artifact takes: {known}")
        return checked

    def _admit(self, length: int) -> int:
        """Places `length` new tokens after those held and points "last" at the final one."""
        end = self.position + length
        if end > self.capacity:
            raise KvOverflow(
                f"{self.position} tokens held + {length} new > {self.capacity} that the KV cache holds",
                self._where,
                "Call reset(), or shorten the input",
            )
        if self._last is not None:
            self._last[0] = end - 1
        return length


_RESHAPE = "Feed an array of the expected shape, in which a name stands for any size"


class _InputCheck:
    """One input's dtype, rank, shape and value range, with an error that says which of them is wrong."""

    def __init__(self, spec: TensorSpec, high: int | None, where: str) -> None:
        self.name = spec.name
        self.dtype = np.dtype(spec.dtype)
        self.shape = tuple(spec.shape)
        self.high = high
        self.floating = self.dtype.kind == "f"
        self.where = f"{where} input {spec.name!r}"

    def __call__(self, array: Array | None, symbols: dict[str, int]) -> Array:
        """The array itself, or a C-contiguous copy of it. `symbols` binds this run's symbolic dimensions."""
        if not isinstance(array, np.ndarray):
            raise self._missing(array)
        if array.dtype != self.dtype:
            raise self._wrong(f"dtype {array.dtype.str}, expected {self.dtype.str}", "Convert it with astype")
        shape = array.shape
        if len(shape) != len(self.shape):
            raise self._wrong(f"rank {len(shape)} (shape {list(shape)}), expected shape {list(self.shape)}", _RESHAPE)
        for size, expected in zip(shape, self.shape, strict=True):
            wanted = symbols.setdefault(expected, size) if isinstance(expected, str) else expected
            if size != wanted:
                raise self._wrong(f"shape {list(shape)}, expected {list(self.shape)}", _RESHAPE)
            if size == 0:
                raise self._wrong(f"empty: shape {list(shape)}", "Feed at least one element")
        if self.high is not None:
            self._check_range(array, self.high)
        elif self.floating and not np.isfinite(array).all():
            raise self._wrong("holds NaN or infinity", "Feed finite values")
        return array if array.flags.c_contiguous else np.ascontiguousarray(array)

    def _check_range(self, array: Array, high: int) -> None:
        # A decoding step feeds one token; min() and max() would cost more than all the other checks together.
        low_value, high_value = (array.item(),) * 2 if array.size == 1 else (array.min(), array.max())
        if low_value < 0 or high_value >= high:
            culprit = low_value if low_value < 0 else high_value
            raise self._wrong(f"value {culprit} is outside 0..{high - 1}", "Feed ids of this model's own range")

    def _missing(self, value: object) -> RuntimeInputError:
        if value is None:
            return self._wrong("is missing", "Feed every input of the signature")
        return self._wrong(f"is a {type(value).__name__}, not a numpy array", "Convert it with numpy.asarray")

    def _wrong(self, what: str, way_out: str) -> RuntimeInputError:
        return RuntimeInputError(what, self.where, way_out)


def choose_artifact(
    bundle: Bundle, component: str, backend: str | None = None, form: str | None = None, mode: str | None = None
) -> Artifact:
    """The preferred artifact of a component among those of the given backend, form and mode.

    `backend` holds for every component; a form or mode that only the language model has (a fast mode) leaves the
    other components with what they do have. Raises BundleError listing what the bundle holds.
    """
    held = [a for a in bundle.artifacts if a.component == component and backend in (None, a.backend)]
    for name, wanted in (("form", form), ("mode", mode)):
        matching = [a for a in held if wanted in (None, getattr(a, name))]
        held = matching if matching or component == "lm" else held
    if not held:
        return bundle.artifact(component, backend, form, mode)  # raises, naming what there is
    return max(held, key=lambda a: a.preferred)


BACKENDS: dict[str, tuple[str, str]] = {
    "onnx": ("runtimes.onnxruntime_", "OnnxRuntimeSession"),
    "openvino": ("runtimes.openvino_", "OpenVinoSession"),
    "tvm": ("runtimes.tvm_", "TvmSession"),
    "coreml": ("runtimes.coreml_", "CoreMlSession"),
    "tensorrt": ("runtimes.tensorrt_", "TensorRtSession"),
    "torch": ("runtimes.torch_", "TorchSession"),
}


def open_session(
    bundle: Bundle, artifact: Artifact, threads: int | None = None, *, timing: bool = False
) -> CheckedSession:
    """Loads an artifact of a bundle. `threads` None leaves the number to the backend.

    Raises BackendUnavailable for a backend that this version does not know or whose package is not installed, or for an
    artifact of a device that is not here; WrongRuntime for one that was made for another version of the runtime.
    """
    entry = BACKENDS.get(artifact.backend)
    if entry is None:
        known = ", ".join(sorted(BACKENDS))
        raise BackendUnavailable(f"no runtime for backend {artifact.backend!r}", artifact.component, f"Known: {known}")
    module, name = entry
    try:
        check_runtime(artifact.runtime, f"{artifact.component} ({artifact.label})")
        session_class: type[CheckedSession] = getattr(import_module(module), name)
        return session_class.open(bundle, artifact, threads=threads, timing=timing)
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            f"package {error.name!r} is not installed",
            f"backend {artifact.backend!r}",
            f"Install it with the extra of that name: pip install '.[{artifact.backend}]'",
        ) from error
