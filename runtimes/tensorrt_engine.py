"""An engine of TensorRT or TensorRT-RTX as a session: the KV cache never leaves the device.

`EngineSession` knows positions, pieces and candidates; an `Engine` knows the device (runtimes/device_engine.py). A
decode step is a few small copies and the launch of one CUDA graph.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from runtimes import engines
from runtimes.cuda_driver import Driver
from runtimes.device_engine import DeviceEngine
from runtimes.engines import Machine, this_system
from runtimes.session import Array, BackendUnavailable, CheckedSession, Limits, limits_of
from runtimes.tensorrt_options import RTX, options_of
from runtimes.tensorrt_plan import TensorRtPlan
from runtimes.tensorrt_plugins import register

if TYPE_CHECKING:
    from runtimes.bundle import Artifact, Bundle

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
        self._head = options_of(artifact).head
        self.candidates = self._head.k if self._head else 0
        self.effective = dict(engine.effective)
        self._outputs = tuple(spec.name for spec in artifact.outputs)
        self._rows = np.array([0, self._vocabulary], np.int32)

    @classmethod
    def open(cls, bundle: Bundle, artifact: Artifact, *, threads: int | None = None, timing: bool = False) -> Self:
        """The engine that travels with the bundle, or the one that was built here; each is checked before it is used.

        Raises:
            BackendUnavailable: no GPU, or no package of the vendor's.
            WrongEngine, MissingPlugin, OutOfDeviceMemory.
        """
        options = options_of(artifact)
        driver = Driver()
        try:
            tensorrt = load_module(artifact)
            content = engines.read(bundle, artifact, this_machine(driver, tensorrt))
            if options.engine is None:
                packaging = engines.packaging_of(bundle, artifact)
                register(bundle, artifact, tensorrt, bundle.folder / engines.FOLDER, packaging)
            plan = TensorRtPlan(content, artifact, tensorrt, int(driver.stream.value or 0))
            engine = DeviceEngine(plan, driver, artifact)
        except BaseException:
            driver.close()
            raise
        return cls(engine, artifact, limits_of(bundle, artifact), timing=timing)

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        return self._pieces(feeds, self._outputs)

    def _run_top(self, feeds: dict[str, Array], first: int, end: int) -> tuple[Array, Array]:
        assert self._head is not None  # else there are no candidates to ask for
        self._rows[:] = first, end
        try:
            found = self._pieces(feeds, (self._head.values, self._head.ids))
            return found[self._head.values][0], found[self._head.ids][0]
        finally:
            self._rows[:] = 0, self._vocabulary

    def _pieces(self, feeds: dict[str, Array], wanted: Sequence[str]) -> dict[str, Array]:
        """The run, in pieces that the engine takes; only the last one's outputs are asked for."""
        start = time.perf_counter() if self.timing else 0.0
        extra = {self._head.rows: self._rows} if self._head else {}
        if not self.capacity:
            results = self._engine.step({**feeds, **extra}, 0, wanted)
        else:
            ids = feeds["ids"]
            length, longest = ids.shape[1], self._engine.longest or ids.shape[1]
            for begin in range(0, length, longest):
                piece = ids[:, begin : begin + longest]
                end = begin + piece.shape[1]
                last = np.array([self.position + end - 1], np.int32)
                asked = wanted if end == length else ()
                results = self._engine.step({"ids": piece, "last": last, **extra}, self.position + begin, asked)
        if self.timing:
            self.last_run_seconds = time.perf_counter() - start
        return results

    def _reset(self) -> None:
        """Nothing to clear: slots beyond the position are never read, and a position's slot is written before use."""

    def _close(self) -> None:
        self._engine.close()


def load_module(artifact: Artifact) -> Any:
    """The vendor's Python package for the artifact. Raises BackendUnavailable."""
    name = _MODULES.get(options_of(artifact).generation, "tensorrt")
    try:
        return import_module(name)
    except ImportError as error:
        way_out = "pip install tensorrt_rtx" if name == "tensorrt_rtx" else "It is part of JetPack and of TensorRT"
        raise BackendUnavailable(f"package {name!r} cannot be loaded ({error})", artifact.component, way_out) from error


def this_machine(driver: Driver, tensorrt: Any) -> Machine:
    """What an engine that is built here belongs to."""
    rtx = tensorrt.__name__ == "tensorrt_rtx"
    return machine_with(driver, f"TensorRT-RTX {tensorrt.__version__}" if rtx else released(tensorrt.__version__))


def released(version: str) -> str:
    """The compiler's name, such as TensorRT 10.13.3 of "10.13.3.9": trtexec says no more of itself."""
    return f"TensorRT {'.'.join(version.split('.')[:3])}"


def machine_with(driver: Driver, compiler: str) -> Machine:
    """This machine and the compiler of its engines."""
    return Machine(compiler, driver.sm, driver.name, driver.uuid, driver.cuda, this_system())
