"""TVM session: a compiled library with our kernels inside, run by relax's virtual machine on the CPU.

Everything that a step takes (weights, KV cache, token buffers) is bound to the compiled functions once; kernels write
the cache in place. A prompt runs on the compiled lengths (runtimes/buckets.py). A library for another processor runs
under an emulator, where there is one (runtimes/tvm_emulated.py).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from runtimes.buckets import History
from runtimes.errors import RUN_AGAIN, Fault
from runtimes.host import usable_cores
from runtimes.session import Array, CheckedSession, Limits, OutOfDeviceMemory, limits_of
from runtimes.tvm_emulated import Emulated
from runtimes.tvm_files import ALIGNMENT, aligned, check_machine, is_foreign, read_parameters

if TYPE_CHECKING:
    from pathlib import Path

    from runtimes.bundle import Artifact, Bundle

AGAIN = "Fetch or build the bundle again"
# TVM's mode of its thread pool that takes the fastest cores.
_BIG_CORES = 1
# Thread -> how many threads its pool has.
_POOL: dict[int, int] = {}


class BrokenLibrary(Fault):
    """The compiled library, or its file of weights, is not what the artifact says."""


class Library(Protocol):
    """A loaded artifact, here or in an emulator. Calls give the outputs, without the states."""

    effective: dict[str, str]
    stand_in: str | None

    def bind(self, function: str, feeds: Mapping[str, Array]) -> Callable[[], list[Array]]:
        """A callable without arguments: `function` on these very arrays, which the caller may change."""

    def call(self, function: str, feeds: Mapping[str, Array]) -> list[Array]:
        """One call on arrays of any place in memory."""

    def use_threads(self, count: int) -> None:
        """How many threads the kernels may use from now on."""

    def close(self) -> None:
        """Releases everything."""


class TvmSession(CheckedSession):
    """One compiled library. Use `open`; the arguments are those of CheckedSession and what `open` loaded."""

    def __init__(
        self, loaded: Library, artifact: Artifact, limits: Limits, *, threads: int | None = None, timing: bool = False
    ) -> None:
        super().__init__(artifact, limits, timing=timing)
        self._loaded: Library | None = loaded
        self._threads = threads or usable_cores()
        self.effective, self.stand_in = loaded.effective, loaded.stand_in
        self._names = [spec.name for spec in artifact.outputs]
        self._bound: dict[int, tuple[Array, Callable[[], list[Array]]]] = {}
        if artifact.states:
            self._history = History(limits.capacity)
            self._bind_states()

    @classmethod
    def open(cls, bundle: Bundle, artifact: Artifact, *, threads: int | None = None, timing: bool = False) -> Self:
        """Loads the library and maps the weights. `threads` None uses every core that this process may run on.

        Raises WrongMachine where this processor lacks an extension, BackendUnavailable for another processor's code
        without an emulator or another device's, BrokenLibrary, BrokenParameters.
        """
        check_machine(artifact)
        loaded: Library
        if is_foreign(artifact):
            loaded = Emulated(bundle, artifact)
        else:
            files = bundle.file(artifact.model), bundle.file(artifact.options["parameters"])
            loaded = Loaded(artifact, *files)
        return cls(loaded, artifact, limits_of(bundle, artifact), threads=threads, timing=timing)

    def _bind_states(self) -> None:
        loaded = self._loaded
        assert loaded is not None and self._last is not None  # every artifact with states takes "last"
        self._last_given = aligned((1,), "int32")
        self._states = {s.input: aligned(s.shape, s.dtype) for s in self.artifact.states}
        for length, function in self.artifact.options["functions"].items():
            ids = aligned((1, int(length)), "int32")
            feeds = {"ids": ids, "last": self._last_given, **self._states}
            self._bound[int(length)] = ids, loaded.bind(function, feeds)
        self.lengths = tuple(sorted(self._bound))

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        start = time.perf_counter() if self.timing else 0.0
        assert self._loaded is not None  # CheckedSession lets nothing in after close
        self._loaded.use_threads(self._threads)
        try:
            results = self._steps(feeds) if self._bound else self._whole(feeds)
        except Fault:
            raise
        except Exception as error:
            raise _fault(error, self._where) from error
        if self.timing:
            self.last_run_seconds = time.perf_counter() - start
        return dict(zip(self._names, results, strict=True))

    def _steps(self, feeds: dict[str, Array]) -> list[Array]:
        results: list[Array] = []
        for ids, last in self._history.runs(feeds["ids"], self.position, list(self._bound)):
            given, run = self._bound[ids.shape[1]]
            given[:] = ids
            self._last_given[0] = last
            results = run()
        return results

    def _whole(self, feeds: dict[str, Array]) -> list[Array]:
        assert self._loaded is not None
        return self._loaded.call("run", feeds)

    def _reset(self) -> None:
        """Nothing to clear: slots beyond the position are never read, and a position's slot is written before use."""

    def _close(self) -> None:
        if self._loaded is not None:
            self._loaded.close()
        self._loaded = None
        self._bound.clear()


class Loaded:
    """A library in TVM's virtual machine, with its weights."""

    stand_in: str | None = None

    def __init__(self, artifact: Artifact, library: Path, parameters: Path) -> None:
        # TVM would bind the calling thread to one core, and with it every other session of the process.
        os.environ.setdefault("TVM_BIND_THREADS", "0")
        import tvm

        read = read_parameters(parameters)
        self._weights = {name: tvm.runtime.from_dlpack(values) for name, values in read.items()}
        try:
            self.library = tvm.runtime.load_module(str(library))
            self._machine = tvm.relax.VirtualMachine(self.library, tvm.cpu())
            self._arguments = {name: self._names_of(name) for name in artifact.options["functions"].values()}
        except Exception as error:
            raise BrokenLibrary(f"TVM cannot load it: {error}", str(library), AGAIN) from error
        self._count = len(artifact.outputs)
        self._check_weights(artifact)
        self._configure = tvm.get_global_func("runtime.config_threadpool")
        self._observed = {node: name for name, node in artifact.options.get("observed", {}).items()}
        self._seen: dict[str, Array] = {}
        if self._observed:
            self._count -= len(self._observed)
            self._machine.set_instrument(self._keep)
        variant = str(self.library.get_function("edge_variant", query_imports=True)())
        self.effective = {"kernels": variant, "activations": artifact.precision["activations"]}

    def _names_of(self, function: str) -> list[str]:
        executable = self.library["vm_load_executable"]()
        count = executable["get_function_arity"](function)
        return [executable["get_function_param_name"](function, index) for index in range(count)]

    def _check_weights(self, artifact: Artifact) -> None:
        given = {spec.name for spec in artifact.inputs} | {state.input for state in artifact.states}
        missing = sorted({n for names in self._arguments.values() for n in names} - given - set(self._weights))
        if missing:
            raise BrokenLibrary(
                f"{missing[0]!r} is not among the weights ({len(missing)} missing)",
                artifact.options["parameters"],
                AGAIN,
            )

    def bind(self, function: str, feeds: Mapping[str, Array]) -> Callable[[], list[Array]]:
        """See Library."""
        self._machine.save_function(function, f"{function} bound", *self._arguments_from(function, feeds))
        bound = self._machine[f"{function} bound"]
        return lambda: self._outputs(bound())

    def call(self, function: str, feeds: Mapping[str, Array]) -> list[Array]:
        """See Library."""
        return self._outputs(self._machine[function](*self._arguments_from(function, feeds)))

    def _outputs(self, results: Any) -> list[Array]:
        outputs = [np.from_dlpack(results[index]) for index in range(self._count)]
        return outputs + [self._seen[node] for node in self._observed]

    def _keep(self, function: Any, symbol: str, before: bool, result: Any, *arguments: Any) -> int:
        """Called by the machine around every call: copies the first result of an observed node, which stands behind
        the node's name."""
        if not before and symbol.startswith("edge_"):
            at = next(index for index, value in enumerate(arguments) if isinstance(value, str))
            if arguments[at] in self._observed:
                self._seen[str(arguments[at])] = arguments[at + 1].numpy()
        return 0

    def close(self) -> None:
        """See Library."""
        self._machine = self.library = None
        self._weights.clear()

    def _arguments_from(self, function: str, feeds: Mapping[str, Array]) -> list[Any]:
        import tvm

        given = {name: tvm.runtime.from_dlpack(_on_line(values)) for name, values in feeds.items()}
        return [given[name] if name in given else self._weights[name] for name in self._arguments[function]]

    def use_threads(self, count: int) -> None:
        """Sets the size of TVM's thread pool, which belongs to the calling thread."""
        if _POOL.get(threading.get_ident()) != count:
            self._configure(_BIG_CORES, count)
            _POOL[threading.get_ident()] = count


def _on_line(values: Array) -> Array:
    """The array itself where it begins on a cache line, as TVM's own code needs it, else a copy that does."""
    if values.ctypes.data % ALIGNMENT == 0 and values.flags.writeable:
        return values
    copy = aligned(values.shape, values.dtype)
    copy[:] = values
    return copy


def _fault(error: Exception, where: str) -> Exception:
    text = str(error)
    if isinstance(error, MemoryError) or "bad_alloc" in text or "Out of memory" in text:
        return OutOfDeviceMemory(text, where, "Use a shorter context or a smaller batch")
    return Fault(text, where, RUN_AGAIN)
