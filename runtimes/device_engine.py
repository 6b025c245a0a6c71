"""Runs a loaded engine with everything that it reads and writes in the device's memory, allocated once.

`DeviceEngine` holds the logic: which buffer is bound where, what is copied when, where new rows of a cache go, and when
a step is recorded and replayed. It reaches the hardware by two thin objects only, a `Device` (memory and stream;
runtimes/cuda_driver.py) and a `Plan` (the vendor's engine; runtimes/tensorrt_plan.py), so the same logic runs over the
host's memory and another executor of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from runtimes.manifest import Artifact
from runtimes.session import Array, OutOfDeviceMemory
from runtimes.tensorrt_options import Options, Shape, options_of


class Device(Protocol):
    """Memory of a device and one stream of work; every call but `wait` and `close` may return before it is done."""

    def enter(self) -> None:
        """Makes the device the calling thread's."""

    def allocate(self, size: int) -> int:
        """Address of ``size`` zeroed bytes. Raises OutOfDeviceMemory."""

    def free(self, pointer: int) -> None: ...

    def pinned(self, size: int) -> Array:
        """uint8 [size] in the host's memory, which copies reach directly; freed with the last view of it."""

    def to_device(self, target: int, source: int, size: int) -> None: ...

    def to_host(self, target: int, source: int, size: int) -> None: ...

    def copy_rows(self, target: int, pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """``rows`` times ``width`` bytes within the device; each row begins ``pitch`` bytes after the one before."""

    def wait(self) -> None:
        """Until everything in the stream is done."""

    def begin_capture(self) -> None:
        """From here on the stream's work is recorded instead of run."""

    def end_capture(self) -> Any:
        """What was recorded."""

    def launch(self, recorded: Any) -> None: ...

    def release(self, recorded: Any) -> None:
        """Forgets what was recorded."""

    def close(self) -> None: ...


class Plan(Protocol):
    """A loaded engine with one context for each of its shape ranges, given by number.

    Attributes:
        inputs, outputs: every tensor's name and type.
        effective: what it computes in, as `CheckedSession.effective`.
    """

    inputs: Mapping[str, np.dtype[Any]]
    outputs: Mapping[str, np.dtype[Any]]
    effective: Mapping[str, str]

    def set_shape(self, context: int, name: str, shape: Shape) -> None:
        """Of an input."""

    def shape(self, context: int, name: str) -> Shape:
        """Of any tensor, by the inputs' present shapes."""

    def bind(self, context: int, name: str, address: int) -> None:
        """Where a tensor lies from now on."""

    def enqueue(self, context: int) -> None:
        """Puts one run into the device's stream."""

    def capturable(self, context: int) -> bool:
        """Whether a run can be recorded."""

    def close(self) -> None: ...


class DeviceEngine:
    """An engine's step. `longest` is the most tokens of one run, 0 where there are no states.

    Inputs, states and outputs are allocated at their largest when it is made. A state's output is bound to the memory
    of its input; where it is only the new rows ("delta"), it has a buffer of its own, from which they are copied.
    """

    def __init__(self, plan: Plan, device: Device, artifact: Artifact) -> None:
        """Takes over plan and device, to be closed by `close`; also where it raises (OutOfDeviceMemory)."""
        self._plan, self._device = plan, device
        self._options: Options = options_of(artifact)
        self._states = {state.input: state.output for state in artifact.states}
        self._shapes = {state.input: tuple(int(size) for size in state.shape) for state in artifact.states}
        self._types = {**plan.inputs, **plan.outputs}
        self._contexts = len(self._options.ranges)
        self._where = f"{artifact.component} ({artifact.label})"
        self._address: dict[str, int] = {}
        self._pinned: dict[str, Array] = {}
        self._recorded: Any = None
        self.effective = plan.effective
        ranges = [{name: shapes[2] for name, shapes in each.items()} for each in self._options.ranges.values()]
        self.longest = ranges[-1]["ids"][1] if self._states else 0
        try:
            self._allocate(ranges)
        except BaseException:
            self.close()
            raise

    def _allocate(self, ranges: Sequence[Mapping[str, Shape]]) -> None:
        sizes: dict[str, int] = {}
        for context, largest in enumerate(ranges):
            for name, shape in largest.items():
                self._plan.set_shape(context, name, shape)
            for name, kind in self._types.items():
                sizes[name] = max(sizes.get(name, 0), math.prod(self._plan.shape(context, name)) * kind.itemsize)
        shared = {} if self._options.delta else {output: state for state, output in self._states.items()}
        total = sum(size for name, size in sizes.items() if name not in shared)
        try:
            for name, size in sizes.items():
                if name not in shared:
                    self._address[name] = self._device.allocate(size)
                if name not in self._states and name not in self._states.values():
                    self._pinned[name] = self._device.pinned(size)
        except OutOfDeviceMemory as error:
            raise OutOfDeviceMemory(
                f"out of memory for inputs, states and outputs ({total / 1e6:.0f} MB, at {name!r})",
                self._where,
                "Close what else uses the device, or build the bundle with a shorter context",
            ) from error
        self._address |= {output: self._address[state] for output, state in shared.items()}
        for context in range(len(ranges)):
            for name, address in self._address.items():
                self._plan.bind(context, name, address)
        self._device.wait()

    def step(self, feeds: Mapping[str, Array], position: int, wanted: Sequence[str]) -> dict[str, Array]:
        """One run; the states hold ``position`` tokens before it.

        Returns:
            The outputs of ``wanted``, as views that the next step overwrites; the others stay on the device.
        """
        self._device.enter()
        decoding = bool(self._states) and feeds["ids"].shape[1] == 1
        context = 0 if decoding else self._contexts - 1
        for name, values in feeds.items():
            self._feed(context, name, values)
        self._run(context, decoding)
        if self._options.delta:
            self._write_rows(position, feeds["ids"].shape[1])
        results = {name: self._fetch(context, name) for name in wanted}
        self._device.wait()
        return results

    def _feed(self, context: int, name: str, values: Array) -> None:
        """In the type that the engine has: an exporter may have made int32 of int64."""
        kind, size = self._types[name], values.size * self._types[name].itemsize
        pinned = self._pinned[name]
        pinned[:size].view(kind).reshape(values.shape)[...] = values
        self._device.to_device(self._address[name], pinned.ctypes.data, size)
        self._plan.set_shape(context, name, values.shape)

    def _run(self, context: int, decoding: bool) -> None:
        """Decoding runs plainly once, for the vendor's library may allocate then; later steps replay one recording."""
        if decoding and self._recorded is not None:
            self._device.launch(self._recorded)
            return
        self._plan.enqueue(context)
        if decoding and self._plan.capturable(context):
            self._device.wait()
            self._device.begin_capture()
            self._plan.enqueue(context)  # recorded, not run
            self._recorded = self._device.end_capture()

    def _write_rows(self, position: int, steps: int) -> None:
        """New rows [B, KV, S, D] into caches [B, KV, C, D].

        Their place changes with every step, so they are no part of the recording: a recording with a place in it would
        need two of its nodes a layer changed before each launch, which costs what the two copies cost.
        """
        for state, output in self._states.items():
            batch, heads, capacity, width = self._shapes[state]
            row = width * self._types[state].itemsize
            target, source = self._address[state] + position * row, self._address[output]
            self._device.copy_rows(target, capacity * row, source, steps * row, steps * row, batch * heads)

    def _fetch(self, context: int, name: str) -> Array:
        shape, kind = self._plan.shape(context, name), self._types[name]
        size = math.prod(shape) * kind.itemsize
        pinned = self._pinned[name]
        self._device.to_host(pinned.ctypes.data, self._address[name], size)
        return pinned[:size].view(kind).reshape(shape)

    def close(self) -> None:
        """Gives everything back; a second call does nothing. Arrays that `step` returned stay readable."""
        if self._recorded is not None:
            self._device.release(self._recorded)
            self._recorded = None
        self._plan.close()
        for pointer in set(self._address.values()):
            self._device.free(pointer)
        self._address, self._pinned = {}, {}
        self._device.close()
