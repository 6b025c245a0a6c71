"""Tiny graphs as TensorRT artifacts, and the host's memory with ONNX Runtime as the device behind a DeviceEngine.

The language model counts: a token adds its rows to a key and a value cache, and the logits are a product with the sum
of all rows up to the last token's. All numbers are small integers, so that every order of sums gives the same bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from runtimes.bundle import Artifact, Bundle, load_bundle, write_manifest
from runtimes.device_engine import DeviceEngine
from runtimes.session import OutOfDeviceMemory, limits_of
from runtimes.tensorrt_engine import EngineSession
from runtimes.tensorrt_options import options_of
from tests.bundle_maker import manifest

Array = np.ndarray[Any, Any]
VOCAB, CAPACITY, HEADS, LONGEST, K = 11, 16, 2, 5, 3
WIDTHS = {"key": 2, "value": 3}
_numbers = np.random.default_rng(5)
EMBEDDING = {name: _numbers.integers(-3, 4, (VOCAB, HEADS, width)).astype(np.float16) for name, width in WIDTHS.items()}
HEAD = {name: _numbers.integers(-3, 4, (HEADS * width, VOCAB)).astype(np.float32) for name, width in WIDTHS.items()}


def expected(ids: Array) -> Array:
    """Logits float32 [1, V] after the tokens [1, S]."""
    return sum(EMBEDDING[name][ids[0]].astype(np.float32).sum(0).reshape(1, -1) @ HEAD[name] for name in WIDTHS)  # type: ignore[return-value]


class _Graph:
    """Nodes by the call, so that a graph reads like the function that it is."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def __call__(self, kind: str, *inputs: str, outputs: int = 1, name: str = "", **attributes: Any) -> Any:
        made = [name or f"t{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), made, **attributes))
        return made[0] if outputs == 1 else made

    def constant(self, value: Array) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name


def counting_model(states: str, head: bool, ids_type: int = TensorProto.INT32) -> onnx.ModelProto:
    """The language model; ``states`` is "aliased" or "delta"."""
    g = _Graph()

    def integers(*values: int) -> str:
        return g.constant(np.array(values, np.int64))

    zero, one = g.constant(np.array(0, np.int64)), g.constant(np.array(1, np.int64))
    ids, last = g("Cast", "ids", to=TensorProto.INT64), g("Cast", "last", to=TensorProto.INT64)
    length = g("Gather", g("Shape", ids), one)
    end = g("Add", g("Squeeze", last), one)
    begin = g("Sub", end, length)
    slots = g.constant(np.arange(CAPACITY))
    products, present = [], []
    for name, width in WIDTHS.items():
        new = g("Transpose", g("Gather", g.constant(EMBEDDING[name]), ids), perm=[0, 2, 1, 3])  # [1, KV, S, D]
        past = f"past_{name}"
        if states == "delta":
            g("Identity", new, name=f"new_{name}")
            present.append((f"new_{name}", [1, HEADS, "S", width]))
            seen = g("Slice", past, g("Unsqueeze", zero, zero), g("Unsqueeze", begin, zero), integers(2))
            rows = g("Concat", seen, new, axis=2)
        else:
            at = g("Range", begin, end, one)
            hit = g("Equal", g("Unsqueeze", slots, one), g("Unsqueeze", at, zero))  # [C, S]
            spread = g("MatMul", g("Cast", hit, to=TensorProto.FLOAT16), new)
            inside = g("And", g("GreaterOrEqual", slots, begin), g("Less", slots, end))
            full = g("Where", g("Unsqueeze", inside, one), spread, past, name=f"present_{name}")
            present.append((f"present_{name}", [1, HEADS, CAPACITY, width]))
            rows = g("Slice", full, g("Unsqueeze", zero, zero), g("Unsqueeze", end, zero), integers(2))
        summed = g("ReduceSum", g("Cast", rows, to=TensorProto.FLOAT), integers(2), keepdims=0)
        products.append(g("MatMul", g("Reshape", summed, integers(1, -1)), g.constant(HEAD[name])))
    outputs: list[tuple[str, int, list[Any]]] = [("logits", TensorProto.FLOAT, [1, VOCAB])]
    inputs: list[tuple[str, int, list[Any]]] = [("ids", ids_type, [1, "S"]), ("last", TensorProto.INT32, [1])]
    if head:
        inputs.append(("rows", TensorProto.INT32, [2]))
        bounds = g("Cast", "rows", to=TensorProto.INT64)
        vocabulary = g.constant(np.arange(VOCAB))
        first, behind = g("Gather", bounds, zero), g("Gather", bounds, one)
        inside = g("And", g("GreaterOrEqual", vocabulary, first), g("Less", vocabulary, behind))
        g("Where", inside, g("Add", *products), g.constant(np.float32(-np.inf).reshape(())), name="logits")
        values, best = g("TopK", "logits", integers(K), outputs=2)
        g("Identity", values, name="values")
        g("Cast", best, to=TensorProto.INT32, name="best")
        outputs += [("values", TensorProto.FLOAT, [1, K]), ("best", TensorProto.INT32, [1, K])]
    else:
        g("Add", *products, name="logits")
    inputs += [(f"past_{name}", TensorProto.FLOAT16, [1, HEADS, CAPACITY, width]) for name, width in WIDTHS.items()]
    outputs += [(name, TensorProto.FLOAT16, shape) for name, shape in present]
    return _model(g, inputs, outputs)


def decoder_model() -> onnx.ModelProto:
    """codes [B, T] of several lengths -> audio [B, 1, T]: twice each code."""
    g = _Graph()
    doubled = g("Mul", g("Cast", "codes", to=TensorProto.FLOAT), g.constant(np.array(2, np.float32)))
    g("Unsqueeze", doubled, g.constant(np.array([1])), name="audio")
    sizes: list[Any] = ["B", "T"]
    return _model(g, [("codes", TensorProto.INT32, sizes)], [("audio", TensorProto.FLOAT, ["B", 1, "T"])])


def _model(g: _Graph, inputs: list[Any], outputs: list[Any]) -> onnx.ModelProto:
    graph = helper.make_graph(
        g.nodes,
        "tiny",
        [helper.make_tensor_value_info(*spec) for spec in inputs],
        [helper.make_tensor_value_info(*spec) for spec in outputs],
        g.constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def tiny_engine_bundle(folder: Path, states: str = "aliased", *, head: bool = True, rtx: bool = False) -> Bundle:
    """A bundle with the language model and the decoder as TensorRT artifacts of an Orin, or of an RTX 4090 with engines
    (some bytes) that travel in it."""
    (folder / "tensorrt").mkdir(parents=True)
    (folder / "golden").mkdir()
    (folder / "golden/lm.safetensors").write_bytes(b"golden")
    (folder / "tensorrt/lm.typed.fp16.onnx").write_bytes(counting_model(states, head).SerializeToString())
    (folder / "tensorrt/audio.typed.fp16.onnx").write_bytes(decoder_model().SerializeToString())
    compiled = {"status": "built", "compiler": "TensorRT-RTX 1.7.1.116", "capability": "SM89", "layers": 3}
    common = {"generation": "rtx" if rtx else "10.3", "sm": "sm_89" if rtx else "sm_87", "plugins": []}
    base = {"backend": "tensorrt", "form": "typed", "mode": "fp16", "bytes_per_token": 0, "operators": {}}
    base |= {"precision": {"weights": "float16", "activations": "float16"}, "preferred": True}
    output = {"aliased": "present_{}", "delta": "new_{}"}[states]
    ids = [[1, 1]] * 3, [[1, 1], [1, 3], [1, LONGEST]]
    lm = base | {
        "component": "lm",
        "model": "tensorrt/lm.typed.fp16.onnx",
        "files": ["tensorrt/lm.typed.fp16.onnx"],
        "inputs": [
            {"name": "ids", "dtype": "int32", "shape": [1, "S"]},
            {"name": "last", "dtype": "int32", "shape": [1]},
        ],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": [1, VOCAB]}],
        "states": [
            {
                "name": name,
                "dtype": "float16",
                "shape": [1, HEADS, CAPACITY, width],
                "input": f"past_{name}",
                "output": output.format(name),
            }
            for name, width in WIDTHS.items()
        ],
        "options": {
            **common,
            "states": states,
            "ranges": {"decode": {"ids": ids[0]}, "prefill": {"ids": ids[1]}},
            **({"head": {"rows": "rows", "values": "values", "ids": "best", "k": K}} if head else {}),
        },
    }
    audio = base | {
        "component": "audio_decoder",
        "model": "tensorrt/audio.typed.fp16.onnx",
        "files": ["tensorrt/audio.typed.fp16.onnx"],
        "inputs": [{"name": "codes", "dtype": "int32", "shape": ["B", "T"]}],
        "outputs": [{"name": "audio", "dtype": "float32", "shape": ["B", 1, "T"]}],
        "states": [],
        "options": {**common, "ranges": {"any": {"codes": [[1, 1], [1, 4], [2, 9]]}}},
    }
    for artifact in (lm, audio) if rtx else ():
        engine = artifact["model"].replace(".onnx", ".engine")
        (folder / engine).write_bytes(f"the engine of {artifact['component']}".encode() * 50)
        artifact["files"] = [artifact["model"], engine]
        artifact["options"] |= {"engine": engine, "compiled": {**compiled, "patterns": {}}}
    names = [f"engines/{a['component']}.typed.fp16.{end}" for a in (lm, audio) for end in ("engine", "json")]
    device = ("rtx-4090", "x86_64", "sm_89", "TensorRT-RTX 1.7.1.116") if rtx else ("orin", "aarch64", "sm_87", "10.3")
    name, arch, sm, version = device
    fields = manifest(
        artifacts=[lm, audio],
        vocab_size=VOCAB,
        context=CAPACITY,
        special={"bos": None, "eos": [], "pad": None},
        modalities={"text": {"tokens": [0, VOCAB]}},
        profile={"name": name, "os": "linux", "arch": arch, "sm": sm, "tensorrt_version": version},
        mutable=["report.json", "report.md", *names, "engines/timing.cache", "engines/libedge_plugins.so"],
    )
    write_manifest(folder, fields)
    return load_bundle(folder)


class HostDevice:
    """The `Device` protocol over the host's memory. Work waits in a queue until `wait`, as a stream's may; every
    allocation lies between guards, which `free` looks at."""

    GUARD = 64

    def __init__(self, limit: int = 1 << 30) -> None:
        self.left = limit
        self.queue: list[Callable[[], None]] = []
        self.recording: list[Callable[[], None]] | None = None
        self.blocks: dict[int, Array] = {}
        self.calls: list[str] = []
        self.closed = False

    def enter(self) -> None:
        self.calls.append("enter")

    def allocate(self, size: int) -> int:
        self.calls.append("allocate")
        if size > self.left:
            raise OutOfDeviceMemory("no memory left", "host")
        self.left -= size
        block = np.full(size + 2 * self.GUARD, 0xA5, np.uint8)
        block[self.GUARD : self.GUARD + size] = 0
        address = block.ctypes.data + self.GUARD
        self.blocks[address] = block
        return address

    def free(self, pointer: int) -> None:
        block = self.blocks.pop(pointer)
        self.left += block.size - 2 * self.GUARD
        assert (block[: self.GUARD] == 0xA5).all() and (block[-self.GUARD :] == 0xA5).all(), "written out of bounds"

    def pinned(self, size: int) -> Array:
        self.calls.append("pinned")
        return np.zeros(size, np.uint8)

    def submit(self, name: str, work: Callable[[], None]) -> None:
        self.calls.append(name)
        (self.queue if self.recording is None else self.recording).append(work)

    def to_device(self, target: int, source: int, size: int) -> None:
        self.submit("to_device", lambda: _move(target, source, size))

    def to_host(self, target: int, source: int, size: int) -> None:
        self.submit("to_host", lambda: _move(target, source, size))

    def copy_rows(self, target: int, pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        def work() -> None:
            for row in range(rows):
                _move(target + row * pitch, source + row * source_pitch, width)

        self.submit("copy_rows", work)

    def wait(self) -> None:
        assert self.recording is None, "waiting is no part of a recording"
        queue, self.queue = self.queue, []
        for work in queue:
            work()

    def begin_capture(self) -> None:
        assert not self.queue
        self.recording = []

    def end_capture(self) -> list[Callable[[], None]]:
        recorded, self.recording = self.recording, None
        assert recorded
        return recorded

    def launch(self, recorded: list[Callable[[], None]]) -> None:
        self.calls.append("launch")
        self.queue.extend(recorded)

    def release(self, recorded: list[Callable[[], None]]) -> None:
        self.calls.append("release")

    def close(self) -> None:
        self.closed = True


def _move(target: int, source: int, size: int) -> None:
    ctypes.memmove(target, source, size)


class OnnxPlan:
    """The `Plan` protocol over ONNX Runtime: tensors are read and written where they were bound."""

    def __init__(self, bundle: Bundle, artifact: Artifact, device: HostDevice, *, capturable: bool = True) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # else activations are int8
        self._session = onnxruntime.InferenceSession(bundle.file(artifact.model), options)
        self._device, self._capturable = device, capturable
        self.inputs = {each.name: np.dtype(_TYPES[each.type]) for each in self._session.get_inputs()}
        self.outputs = {each.name: np.dtype(_TYPES[each.type]) for each in self._session.get_outputs()}
        self._declared = {e.name: tuple(e.shape) for e in (*self._session.get_inputs(), *self._session.get_outputs())}
        self._ranges = list(options_of(artifact).ranges.values())
        count = len(self._ranges)
        self.bound: list[dict[str, int]] = [{} for _ in range(count)]
        self._sizes: list[dict[str, int]] = [{} for _ in range(count)]
        self.effective: Mapping[str, str] = {"activations": "float16"}
        self.closed = False

    def set_shape(self, context: int, name: str, shape: tuple[int, ...]) -> None:
        if name in self._ranges[context]:
            least, _, most = self._ranges[context][name]
            assert all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True)), "outside of the range"
        for size, declared in zip(shape, self._declared[name], strict=True):
            if isinstance(declared, str):
                self._sizes[context][declared] = size
            else:
                assert size == declared

    def shape(self, context: int, name: str) -> tuple[int, ...]:
        return tuple(self._sizes[context][s] if isinstance(s, str) else s for s in self._declared[name])

    def bind(self, context: int, name: str, address: int) -> None:
        self.bound[context][name] = address

    def _tensor(self, context: int, name: str) -> Array:
        shape, kind = self.shape(context, name), {**self.inputs, **self.outputs}[name]
        size = int(np.prod(shape)) * kind.itemsize
        raw = (ctypes.c_uint8 * size).from_address(self.bound[context][name])
        return np.frombuffer(raw, kind).reshape(shape)

    def enqueue(self, context: int) -> None:
        feeds = {name: self._tensor(context, name) for name in self.inputs}
        targets = {name: self._tensor(context, name) for name in self.outputs}

        def work() -> None:
            results = self._session.run(list(targets), {name: array.copy() for name, array in feeds.items()})
            for target, result in zip(targets.values(), results, strict=True):
                target[...] = result

        self._device.submit("enqueue", work)

    def capturable(self, context: int) -> bool:
        return self._capturable

    def close(self) -> None:
        self.closed = True


_TYPES = {
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}


def engine_session(
    bundle: Bundle, component: str = "lm", *, capturable: bool = True
) -> tuple[EngineSession, HostDevice, OnnxPlan]:
    """A session whose device is the host."""
    artifact = bundle.artifact(component, "tensorrt")
    device = HostDevice()
    plan = OnnxPlan(bundle, artifact, device, capturable=capturable)
    engine = DeviceEngine(plan, device, artifact)
    return EngineSession(engine, artifact, limits_of(bundle, artifact)), device, plan
