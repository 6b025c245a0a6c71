"""An engine of TensorRT or TensorRT-RTX as a session: the KV cache never leaves the device.

`EngineSession` knows positions and runs, an `Engine` knows the device. `DeviceEngine` allocates everything once, binds
each cache's output to the memory of its input, feeds and reads through pinned memory, and records the decode step as
one CUDA graph: a step is two small copies and one launch.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from runtimes import engines
from runtimes.cuda_driver import Driver
from runtimes.engines import Machine, WrongEngine, this_system
from runtimes.errors import Fault
from runtimes.session import Array, BackendUnavailable, CheckedSession, Limits, limits_of
from runtimes.tensorrt_plugins import register

if TYPE_CHECKING:
    from runtimes.bundle import Artifact, Bundle

RTX = "rtx"
_MODULES = {RTX: "tensorrt_rtx"}


class Engine(Protocol):
    """What runs one graph with its states inside. `longest` is the most tokens of one run, 0 for no limit."""

    longest: int
    effective: Mapping[str, str]

    def step(self, feeds: Mapping[str, Array], position: int, wanted: Sequence[str]) -> dict[str, Array]:
        """One run. The states hold ``position`` tokens before it; outputs not wanted stay on the device."""

    def close(self) -> None:
        """Releases the device's memory."""


class EngineSession(CheckedSession):
    """An engine behind the checks of every session; runs longer than the engine takes are cut into pieces."""

    def __init__(self, engine: Engine, artifact: Artifact, limits: Limits, *, timing: bool = False) -> None:
        super().__init__(artifact, limits, timing=timing)
        self._engine = engine
        self._head: dict[str, Any] = artifact.options.get("head") or {}
        self.candidates = int(self._head.get("k", 0))
        self.effective = dict(engine.effective)
        self._outputs = tuple(spec.name for spec in artifact.outputs)
        self._rows = np.array([0, self._vocabulary], np.int32)

    @classmethod
    def open(cls, bundle: Bundle, artifact: Artifact, *, threads: int | None = None, timing: bool = False) -> Self:
        """The engine that travels with the bundle, or the one that was built here; each is checked before it is read.

        Raises:
            BackendUnavailable: no GPU, or no package of the vendor's.
            WrongEngine, MissingPlugin, OutOfDeviceMemory.
        """
        driver = Driver()
        try:
            tensorrt = load_module(artifact)
            if "engine" in artifact.options:
                path = bundle.file(artifact.options["engine"])
            else:
                path = engines.check(bundle, artifact, this_machine(driver, tensorrt))
                register(bundle, artifact, tensorrt, path.parent, engines.packaging_of(bundle, artifact))
            engine = DeviceEngine(path, artifact, driver, tensorrt)
        except BaseException:
            driver.close()
            raise
        return cls(engine, artifact, limits_of(bundle, artifact), timing=timing)

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        return self._pieces(feeds, self._outputs)

    def _run_top(self, feeds: dict[str, Array], first: int, end: int) -> tuple[Array, Array]:
        self._rows[:] = first, end
        try:
            values, ids = (self._head[name] for name in ("values", "ids"))
            found = self._pieces(feeds, (values, ids))
            return found[values][0], found[ids][0]
        finally:
            self._rows[:] = 0, self._vocabulary

    def _pieces(self, feeds: dict[str, Array], wanted: Sequence[str]) -> dict[str, Array]:
        extra = {self._head["rows"]: self._rows} if self._head else {}
        if not self.capacity:
            return self._engine.step({**feeds, **extra}, 0, wanted)
        ids = feeds["ids"]
        length, longest = ids.shape[1], self._engine.longest or ids.shape[1]
        for begin in range(0, length, longest):
            piece = np.ascontiguousarray(ids[:, begin : begin + longest])
            position = self.position + begin
            last = np.array([position + piece.shape[1] - 1], np.int32)
            results = self._engine.step(
                {"ids": piece, "last": last, **extra}, position, wanted if begin + longest >= length else ()
            )
        return results

    def _reset(self) -> None:
        """Nothing to clear: slots beyond the position are never read, and a position's slot is written before use."""

    def _close(self) -> None:
        self._engine.close()


def load_module(artifact: Artifact) -> Any:
    """The vendor's Python package for the artifact. Raises BackendUnavailable."""
    name = _MODULES.get(artifact.options["generation"], "tensorrt")
    try:
        return import_module(name)
    except ImportError as error:
        way_out = "pip install tensorrt_rtx" if name == "tensorrt_rtx" else "It is part of JetPack and of TensorRT"
        raise BackendUnavailable(f"package {name!r} cannot be loaded ({error})", artifact.component, way_out) from error


def this_machine(driver: Driver, tensorrt: Any) -> Machine:
    """What an engine that is built here belongs to."""
    title = "TensorRT-RTX" if tensorrt.__name__ == "tensorrt_rtx" else "TensorRT"
    compiler = f"{title} {tensorrt.__version__}"
    return Machine(compiler, driver.sm, driver.name, driver.uuid, driver.cuda, this_system())


class DeviceEngine:
    """A deserialised engine with its buffers. Not checked here: see engines.check, and Bundle.verify for one that
    travels in the bundle."""

    def __init__(self, path: Path, artifact: Artifact, driver: Driver, tensorrt: Any) -> None:
        self._driver, self._artifact = driver, artifact
        where = f"{artifact.component} ({artifact.label})"
        logger = tensorrt.Logger(tensorrt.Logger.ERROR)
        self._runtime = tensorrt.Runtime(logger)  # must outlive the engine
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise WrongEngine(
                f"{tensorrt.__name__} {tensorrt.__version__} does not take it", str(path), "Run runtimes.finalize again"
            )
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        inputs = [n for n in names if self._engine.get_tensor_mode(n) == tensorrt.TensorIOMode.INPUT]
        self._types = {n: np.dtype(tensorrt.nptype(self._engine.get_tensor_dtype(n))) for n in names}
        self._states = {state.input: state.output for state in artifact.states}
        self._feeds = [name for name in inputs if name not in self._states]
        self._results = [name for name in names if name not in inputs]
        self._delta = artifact.options.get("states") == "delta"
        ranges = list(artifact.options["ranges"].values())
        self._largest = [{name: tuple(shapes[2]) for name, shapes in each.items()} for each in ranges]
        self.longest = self._largest[-1]["ids"][1] if artifact.states else 0
        activations = artifact.precision.get("activations", "float32")
        self.effective: Mapping[str, str] = {"activations": activations, "TensorRT": str(tensorrt.__version__)}
        self._contexts = [self._context(index, where) for index in range(len(ranges))]
        self._device: dict[str, int] = {}
        self._pinned: dict[str, tuple[int, Array]] = {}
        self._allocate()
        self._graph: Any = None

    def _context(self, index: int, where: str) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            raise Fault("the vendor's library makes no execution context", where, "See its message above")
        context.set_optimization_profile_async(index, self._driver.stream.value)
        return context

    def _allocate(self) -> None:
        """Every buffer at its largest; a cache's output shares its input's, unless only new rows come out."""
        sizes: dict[str, int] = {}
        for context, largest in zip(self._contexts, self._largest, strict=True):
            for name, shape in largest.items():
                context.set_input_shape(name, shape)
            for name in (*self._feeds, *self._states, *self._results):
                size = math.prod(context.get_tensor_shape(name)) * self._types[name].itemsize
                sizes[name] = max(sizes.get(name, 0), size)
        shared = {} if self._delta else {output: state for state, output in self._states.items()}
        for name, size in sizes.items():
            if name not in shared:
                self._device[name] = self._driver.allocate(size)
        self._device |= {output: self._device[state] for output, state in shared.items()}
        for name in (*self._feeds, *(n for n in self._results if n not in self._states.values())):
            pointer = self._driver.pinned(sizes[name])
            view = np.ctypeslib.as_array((ctypes.c_uint8 * sizes[name]).from_address(pointer))
            self._pinned[name] = pointer, view
        for context in self._contexts:
            for name, address in self._device.items():
                context.set_tensor_address(name, address)
        self._driver.wait()

    def step(self, feeds: Mapping[str, Array], position: int, wanted: Sequence[str]) -> dict[str, Array]:
        """See Engine. Returned arrays are views that the next step overwrites."""
        decoding = bool(self._states) and feeds["ids"].size == 1
        context = self._contexts[0 if decoding else -1]
        for name, values in feeds.items():
            pointer, view = self._pinned[name]
            raw = np.ascontiguousarray(values, self._types[name])
            view[: raw.nbytes] = raw.reshape(-1).view(np.uint8)
            self._driver.to_device(self._device[name], pointer, raw.nbytes)
            context.set_input_shape(name, raw.shape)
        self._enqueue(context, decoding)
        if self._delta:
            self._write_rows(position, feeds["ids"].shape[1])
        shapes = {name: tuple(context.get_tensor_shape(name)) for name in wanted}
        for name, shape in shapes.items():
            self._driver.to_host(
                self._pinned[name][0], self._device[name], math.prod(shape) * self._types[name].itemsize
            )
        self._driver.wait()
        return {name: self._values(name, shape) for name, shape in shapes.items()}

    def _enqueue(self, context: Any, decoding: bool) -> None:
        """The graph for a decode step, whose first run, which allocates inside the vendor's library, is a plain one."""
        if decoding and self._graph is not None:
            self._driver.launch(self._graph)
            return
        self._execute(context)
        if decoding:
            self._driver.wait()
            self._driver.begin_capture()
            self._execute(context)  # recorded, not run
            self._graph = self._driver.end_capture()

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(self._driver.stream.value):
            where = f"{self._artifact.component} ({self._artifact.label})"
            raise Fault("the engine refused to run", where, "See the vendor's message above")

    def _write_rows(self, position: int, steps: int) -> None:
        """New rows [B, KV, S, D] into caches [B, KV, C, D]. The place changes with every step, so it is no part of the
        graph: two copies a layer, each of some hundred bytes a head."""
        for state in self._artifact.states:
            batch, heads, capacity, width = (int(size) for size in state.shape)
            row = width * self._types[state.input].itemsize
            target = self._device[state.input] + position * row
            source = self._device[state.output]
            self._driver.copy_rows(target, capacity * row, source, steps * row, steps * row, batch * heads)

    def _values(self, name: str, shape: tuple[int, ...]) -> Array:
        raw = self._pinned[name][1][: math.prod(shape) * self._types[name].itemsize]
        return raw.view(self._types[name]).reshape(shape)

    def close(self) -> None:
        """See Engine."""
        self._contexts, self._graph, self._engine = [], None, None
        for pointer in set(self._device.values()):
            self._driver.free(pointer)
        for pointer, _ in self._pinned.values():
            self._driver.free_pinned(pointer)
        self._device, self._pinned = {}, {}
        self._driver.close()
