"""ONNX Runtime behind the Session protocol.

A language model's states live in buffers made once and bound as both input and output of the graph, so the runtime
writes the KV cache in place. For a decode step every other tensor is bound once as well: a step is one call.

A long prompt is run in chunks, which takes no longer and holds one chunk's activations: with a 0.5B student and a
prompt of 512, 498 MB in the place of 588 MB at 392 to 394 tokens/s in both.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from runtimes.errors import RUN_AGAIN, Fault
from runtimes.huge_pages import HugePages
from runtimes.session import Array, CheckedSession, Limits, OutOfDeviceMemory, limits_of

if TYPE_CHECKING:
    from runtimes.bundle import Artifact, Bundle

_PROVIDERS = ["CPUExecutionProvider"]
_FLASH_SWITCH = "ORT_GQA_DISABLE_FLASH_ATTENTION"
# Tokens of a prompt that are run at once.
_CHUNK = 256
# Longest KV cache, in positions, whose whole score matrices are held: those of a chunk are 1 MB for each head.
_WHOLE_SCORES = 1024
# The environment belongs to the whole process: one session is opened under it at a time.
_ENVIRONMENT = threading.Lock()
_OUT_OF_MEMORY = ("bad_alloc", "bad allocation", "Failed to allocate memory")


class IncompatibleModel(Fault):
    """This version of ONNX Runtime cannot load the model."""


class OnnxRuntimeSession(CheckedSession):
    """One ONNX model on the CPU. Use `open`; the arguments are those of CheckedSession and a loaded session."""

    def __init__(self, session: Any, artifact: Artifact, limits: Limits, *, timing: bool = False) -> None:
        super().__init__(artifact, limits, timing=timing)
        self._session = session
        self._pages = HugePages(0)
        self._outputs = [spec.name for spec in artifact.outputs]
        self._states: list[tuple[str, str, Any]] = []
        if artifact.states:
            self._bind_states()

    @classmethod
    def open(cls, bundle: Bundle, artifact: Artifact, *, threads: int | None = None, timing: bool = False) -> Self:
        """Loads the model. `threads` None lets ONNX Runtime use every core.

        Raises IncompatibleModel naming the versions, OutOfDeviceMemory.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.inter_op_num_threads = 1
        if threads is not None:
            options.intra_op_num_threads = threads
        # Otherwise the optimiser turns DequantizeLinear + MatMul into int8 activations by itself (level 4).
        options.add_session_config_entry(
            "session.qdq_matmulnbits_accuracy_level", "4" if artifact.mode == "fast" else "1"
        )
        where = f"{artifact.component} ({artifact.label})"
        paths = [bundle.file(name) for name in artifact.files]
        size = sum(path.stat().st_size for path in paths if path.is_file())  # the loader tells of one that is missing
        pages = HugePages(size)
        with translated(where, loading=True), _attention_kernel(artifact):
            session = onnxruntime.InferenceSession(str(bundle.file(artifact.model)), options, providers=_PROVIDERS)
        pages.loaded()
        opened = cls(session, artifact, limits_of(bundle, artifact), timing=timing)
        opened._pages = pages
        return opened

    def _bind_states(self) -> None:
        import onnxruntime

        value = onnxruntime.OrtValue.ortvalue_from_numpy
        for state in self.artifact.states:
            self._states.append((state.input, state.output, value(np.zeros(state.shape, state.dtype))))
        # Everything a decode step touches is bound once; new values are written into these buffers. An output whose
        # size is free, as an observed one's, is allocated by the runtime in every run.
        sized = [spec for spec in self.artifact.outputs if all(isinstance(size, int) for size in spec.shape)]
        self._fixed = {spec.name: np.zeros([int(n) for n in spec.shape], spec.dtype) for spec in sized}
        self._free = [spec.name for spec in self.artifact.outputs if spec.name not in self._fixed]
        self._token = np.zeros((1, 1), np.int32)
        assert self._last is not None  # every artifact with states takes "last"
        self._decode = self._binding({"ids": self._token, "last": self._last})

    def _binding(self, feeds: dict[str, Array]) -> Any:
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in self._fixed.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name in self._free:
            binding.bind_output(name)
        for source, target, value in self._states:
            binding.bind_ortvalue_input(source, value)
            binding.bind_ortvalue_output(target, value)
        return binding

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        if not self._states:
            return self._stateless(feeds)
        ids = feeds["ids"]
        self.last_run_seconds = 0.0
        end, length = self.position, ids.shape[1]
        # A tensor whose size is free is one of every position of the run, so that run is not divided.
        if self._free or length <= _CHUNK:
            return self._append(ids, end + length)
        for part in np.array_split(ids, -(-length // _CHUNK), axis=1):
            end += part.shape[1]
            outputs = self._append(np.ascontiguousarray(part), end)
        return outputs

    def _append(self, ids: Array, end: int) -> dict[str, Array]:
        """One call of the graph for tokens that end before position ``end``."""
        assert self._last is not None
        self._last[0] = end - 1
        if ids.size == 1:
            self._token[0, 0] = ids[0, 0]
            binding = self._decode
        else:
            binding = self._binding({"ids": ids, "last": self._last})
        start = time.perf_counter() if self.timing else 0.0
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise _fault(error, self._where, loading=False) from error
        if self.timing:
            self.last_run_seconds += time.perf_counter() - start
        if not self._free:
            return self._fixed
        # In the order in which they were bound.
        allocated = binding.get_outputs()[len(self._fixed) :]
        return self._fixed | {name: value.numpy() for name, value in zip(self._free, allocated, strict=False)}

    def _stateless(self, feeds: dict[str, Array]) -> dict[str, Array]:
        start = time.perf_counter() if self.timing else 0.0
        with translated(self._where, loading=False):
            results = self._session.run(self._outputs, feeds)
        if self.timing:
            self.last_run_seconds = time.perf_counter() - start
        return dict(zip(self._outputs, results, strict=True))

    def _reset(self) -> None:
        """Nothing to clear: slots beyond the position are never read, and a position's slot is written before use."""

    def _close(self) -> None:
        self._pages.cancel()
        self._session = None
        self._states = []
        self._decode = None


@contextmanager
def _attention_kernel(artifact: Artifact) -> Iterator[None]:
    """Lets GroupQueryAttention hold whole score matrices where the cache is short.

    A 0.5B student decodes 4 to 9 % faster so, with up to 1024 tokens held, than with the flash kernel; with 3840 held
    it is 14 to 36 % slower, and its prompts take the same time (1.31, two cores, int8 activations). The vendor's switch
    is an environment variable that a kernel reads when it is made; a value that the user has set stands.
    """
    small = bool(artifact.states) and artifact.states[0].shape[2] <= _WHOLE_SCORES
    if not small or _FLASH_SWITCH in os.environ:
        yield
        return
    with _ENVIRONMENT:
        os.environ[_FLASH_SWITCH] = "1"
        try:
            yield
        finally:
            os.environ.pop(_FLASH_SWITCH, None)


@contextmanager
def translated(where: str, *, loading: bool) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _fault(error, where, loading=loading) from error


def _fault(error: Exception, where: str, *, loading: bool) -> Exception:
    """ONNX Runtime's exception as a typed one; what is not from the vendor passes through."""
    import onnxruntime

    text = str(error)
    if not type(error).__module__.startswith("onnxruntime"):
        return error
    if any(sign in text for sign in _OUT_OF_MEMORY):
        return OutOfDeviceMemory(text, where, "Use a shorter context or a smaller batch")
    if loading:
        version = onnxruntime.__version__
        return IncompatibleModel(
            f"ONNX Runtime {version} cannot load it: {text}", where, "Install the version that the manifest names"
        )
    return Fault(text, where, RUN_AGAIN)
