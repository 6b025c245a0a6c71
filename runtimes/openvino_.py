"""OpenVINO behind the Session protocol.

A language model's states live in the plugin, which appends to them in place. The exact mode pins what the plugin
would otherwise choose by itself: bfloat16 where the CPU has it, int8 activations, an int8 KV cache. What it really
computes in is read from the compiled model.

A stateless model is compiled for any shape first; a shape that comes twice in a row gets a model of its own, which the
plugin fuses better (audio decoder, 20 frames, one thread: 2.0 ms against 7.0 ms).
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from runtimes.errors import RUN_AGAIN, Fault
from runtimes.session import Array, BackendUnavailable, CheckedSession, Limits, OutOfDeviceMemory, limits_of

if TYPE_CHECKING:
    from runtimes.bundle import Artifact, Bundle

#: mode -> what the plugin is told; a device that does not know a property is not told it.
MODES: Mapping[str, Mapping[str, Any]] = {
    "exact": {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "KV_CACHE_PRECISION": "f32"},
    "fp16": {"INFERENCE_PRECISION_HINT": "f16", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "KV_CACHE_PRECISION": "f16"},
    "fast": {},
}
#: Beginning of the names of what rounds activations, as the exporter gives them.
_ROUNDS = "quantize_activation"
#: Of a division: it stays one. OpenVINO's own mark, which its reader of exported programs sets and its files lose.
_DIVIDES = "nonconvertable_divide_0"
#: key of `effective` -> the property of the compiled model that it is read from
REPORTED = {
    "precision": "INFERENCE_PRECISION_HINT",
    "activations quantised in groups of": "DYNAMIC_QUANTIZATION_GROUP_SIZE",
    "KV cache": "KV_CACHE_PRECISION",
}
#: Models of one shape that are kept, the latest used.
_KEPT_SHAPES = 4
#: The input that says which row of the cache each row continues.
_BEAM = "beam_idx"
#: Layers of a compiled model that only hold or move values.
_PASSIVE = {"Const", "Input", "Output", "MemoryInput", "MemoryOutput", "Reshape", "Reorder", "ShapeOf", "Broadcast"}


def dividing(model: Any) -> Any:
    """``model``, with activations that are rounded to codes divided by their scales.

    The plugin would multiply by the reciprocal instead, one unit in the last place away: the largest negative value of
    a symmetric scale lies on the tie -127.5, so that would be another code.
    """
    for node in model.get_ops():
        if node.get_type_name() == "Divide" and node.get_friendly_name().startswith(_ROUNDS):
            node.get_rt_info()[_DIVIDES] = True
    return model


class UnreadableModel(Fault):
    """OpenVINO cannot read or compile the model's files."""


class OpenVinoSession(CheckedSession):
    """One IR on a device of OpenVINO. Use `open`."""

    def __init__(
        self, model: Any, compile_model: Any, artifact: Artifact, limits: Limits, *, timing: bool = False
    ) -> None:
        super().__init__(artifact, limits, timing=timing)
        compiled = compile_model(model)
        _check_signature(compiled, artifact, self._where)
        self._model, self._compile = model, compile_model
        self._request = compiled.create_infer_request()
        self._requests: OrderedDict[tuple, Any] = OrderedDict()
        self._previous: tuple = ()
        self.effective = effective(compiled)
        if "float_layers" in artifact.options:  # which convolutions are int8 is part of what a gate judges
            self.effective["weights"] = artifact.precision["weights"]
        if not artifact.states:
            self.effective.pop("KV cache", None)
        self._names = [spec.name for spec in artifact.outputs]
        if artifact.states:
            self._bind_decode()

    @classmethod
    def open(cls, bundle: Bundle, artifact: Artifact, *, threads: int | None = None, timing: bool = False) -> Self:
        """Reads and compiles the model. `threads` None lets OpenVINO use every core.

        Raises UnreadableModel, BackendUnavailable for a device that is not here, OutOfDeviceMemory.
        """
        import openvino

        core = openvino.Core()
        device = str(artifact.options.get("device", "CPU"))
        where = f"{artifact.component} ({artifact.label})"
        _check_device(core, device, where)
        config = dict(MODES[artifact.mode]) | {"PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
        config = _known(core, device, config)
        path = bundle.file(artifact.model)
        for file in artifact.files:
            bundle.file(file)

        def compile_model(model: Any) -> Any:
            return core.compile_model(model, device, config)

        with _translated(where, loading=True):
            return cls(
                dividing(core.read_model(path)), compile_model, artifact, limits_of(bundle, artifact), timing=timing
            )

    def _bind_decode(self) -> None:
        """Everything that a decode step reads is bound once; new values are written into these arrays."""
        assert self._last is not None  # every artifact with states takes "last"
        self._token = np.zeros((1, 1), np.int32)
        self._beam = np.zeros(1, np.int32)
        self._bound = self._tensor(self._token)
        self._request.set_tensor("ids", self._bound)
        self._request.set_tensor("last", self._tensor(self._last))
        self._request.set_tensor(_BEAM, self._tensor(self._beam))

    @staticmethod
    def _tensor(array: Array) -> Any:
        import openvino

        return openvino.Tensor(array, shared_memory=True)

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        with _translated(self._where, loading=False):
            if self.artifact.states:
                request, ids = self._request, feeds["ids"]
                if ids.size == 1:
                    self._token[0, 0] = ids[0, 0]
                    request.set_tensor("ids", self._bound)
                else:
                    request.set_tensor("ids", self._tensor(ids))
            else:
                request = self._request_for(tuple(array.shape for array in feeds.values()))
                for name, array in feeds.items():
                    request.set_tensor(name, self._tensor(array))
            start = time.perf_counter() if self.timing else 0.0
            request.infer()
            if self.timing:
                self.last_run_seconds = time.perf_counter() - start
            return {name: request.get_tensor(name).data for name in self._names}

    def _request_for(self, shapes: tuple) -> Any:
        """The request of the model for any shape, or of the one for these shapes when they are used again."""
        if not self._model.is_dynamic():
            return self._request
        if shapes in self._requests:
            self._requests.move_to_end(shapes)
        elif shapes == self._previous:
            fixed = self._model.clone()
            fixed.reshape({spec.name: shape for spec, shape in zip(self.artifact.inputs, shapes, strict=True)})
            self._requests[shapes] = self._compile(fixed).create_infer_request()
            if len(self._requests) > _KEPT_SHAPES:
                self._requests.popitem(last=False)
        self._previous = shapes
        return self._requests.get(shapes, self._request)

    def _reset(self) -> None:
        if self.artifact.states:
            self._request.reset_state()

    def _close(self) -> None:
        self._request = self._model = self._compile = None
        self._requests.clear()


def effective(compiled: Any) -> dict[str, str]:
    """What a compiled model computes in: its own properties, and how many of its layers run in which type."""
    known = set(map(str, compiled.get_property("SUPPORTED_PROPERTIES")))
    found = {key: _text(compiled.get_property(name)) for key, name in REPORTED.items() if name in known}
    layers = Counter(
        info["runtimePrecision"].astype(str)
        for node in compiled.get_runtime_model().get_ops()
        if (info := node.get_rt_info())["layerType"].astype(str) not in _PASSIVE
    )
    return found | {"layers": " + ".join(f"{count} {name}" for name, count in layers.most_common())}


def _text(value: Any) -> str:
    return value.get_type_name() if hasattr(value, "get_type_name") else str(value)


def _check_device(core: Any, device: str, where: str) -> None:
    first = _first(device)
    here = core.available_devices
    if not any(name == first or name.split(".")[0] == first for name in here):
        raise BackendUnavailable(f"OpenVINO finds no {first}", where, f"It finds: {', '.join(here)}")


def _known(core: Any, device: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The properties that the device has. Where it cannot compute in float16 it is told float32: left to itself, a CPU
    would take bfloat16, which has fewer digits."""
    supported = set(map(str, core.get_property(_first(device), "SUPPORTED_PROPERTIES")))
    known = {name: value for name, value in config.items() if name in supported}
    if "FP16" not in core.get_property(_first(device), "OPTIMIZATION_CAPABILITIES"):
        known = {name: "f32" if value == "f16" else value for name, value in known.items()}
    return known


def _first(device: str) -> str:
    """The device that counts of a string such as "CPU", "GPU.0" or "AUTO:NPU,CPU"."""
    return device.split(":")[-1].split(",")[0].split("(")[0]


def _check_signature(compiled: Any, artifact: Artifact, where: str) -> None:
    there = {name for port in (*compiled.inputs, *compiled.outputs) for name in port.get_names()}
    for spec in (*artifact.inputs, *artifact.outputs):
        if spec.name not in there:
            raise UnreadableModel(f"the model has no {spec.name!r}", where, "Fetch or build the bundle again")


@contextmanager
def _translated(where: str, *, loading: bool) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # every error of OpenVINO is one
        text = str(error).strip()
        if "bad_alloc" in text or "allocate" in text:
            raise OutOfDeviceMemory(text, where, "Use a shorter context or a smaller batch") from error
        if loading:
            raise UnreadableModel(
                f"OpenVINO cannot load it: {text}", where, "Fetch or build the bundle again"
            ) from error
        raise Fault(text, where, RUN_AGAIN) from error
