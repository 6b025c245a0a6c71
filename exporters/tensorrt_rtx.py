"""TensorRT-RTX on the build machine: parses every file of ours, and builds engines, which needs no GPU.

For an RTX profile the engine is what ships. For any other device it is a proxy: the nearest architecture that this
compiler knows stands in, and what is kept of it is the list of layers, which says what of our graph was fused.

An engine is built in a process of its own (`python -m exporters.tensorrt_rtx`), which may be killed for its memory. The
compiler counts its names up over a process and orders some layers by where they lie in memory, so for equal bytes that
process is the same every time (1.7.1.116): without address randomisation (of 8 builds of one file one differed, of 14
with fixed addresses none), and with a request, file names and an environment of equal lengths (20 builds from four
folders gave four engines, one a folder).
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from exporters.errors import ExportError

PACKAGE = "tensorrt_rtx"
#: Arguments of personality(2): ask, and ADDR_NO_RANDOMIZE (linux/personality.h).
_QUERY, _NO_RANDOMIZE = 0xFFFFFFFF, 0x0040000
#: Names in the child's working folder: the folder of the model, and the engine.
_MODEL, _ENGINE = "model", "engine"
#: What the child keeps of the environment.
_KEPT = ("LD_LIBRARY_PATH", "SYSTEMROOT")
#: What the compiler says where memory was lacking.
_OUT_OF_MEMORY = ("bad_alloc", "OutOfMemory", "out of memory")
#: sm of a profile -> (compute capability that is compiled for, whether it is the profile's own)
CAPABILITIES: Mapping[str, tuple[str, bool]] = {
    **{f"sm_{number}": (f"SM{number}", True) for number in (75, 80, 86, 89, 120, 121)},
    "sm_87": ("SM86", False),
    "sm_90": ("SM89", False),
    "sm_100": ("SM120", False),
    "sm_103": ("SM120", False),
    "sm_110": ("SM120", False),
}
_LAYER = re.compile(r"^Name: (?P<name>.+?), LayerType: (?P<kind>\w+), .*?Metadata: ?(?P<nodes>.*)$")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")

Ranges = Mapping[str, Mapping[str, Sequence[Sequence[int]]]]


class ParserRejected(ExportError):
    """TensorRT's parser does not take a node of the file."""


class EngineFailed(ExportError):
    """The compiler could not build an engine of a file that it parsed."""


@dataclass(frozen=True)
class Layer:
    """One layer of a built engine: its kind in the compiler's words, and the ONNX nodes that it computes."""

    name: str
    kind: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Built:
    """What the compiler made of a file.

    Attributes:
        compiler: its name and version.
        capability: the architecture that was compiled for; "" where the file was only parsed.
        own: that is the profile's own, else a proxy.
        engine: the engine's bytes, empty where the file was only parsed.
        layers: of the engine.
    """

    compiler: str
    capability: str
    own: bool
    engine: bytes
    layers: tuple[Layer, ...]


def installed() -> bool:
    """Whether the compiler is on this machine (the extra "tensorrt")."""
    return find_spec(PACKAGE) is not None


def compile_file(path: Path, sm: str, ranges: Ranges, *, engine: bool = True) -> Built:
    """Parses a file and builds its engine; the same bytes from every build of the same file.

    Args:
        sm: the profile's, as in "sm_87".
        ranges: name of a shape range -> input -> smallest, usual and largest shape.
        engine: build it; else the file is only parsed.

    Raises:
        ParserRejected: naming node and operator. EngineFailed: naming what the compiler says.
    """
    capability, own = CAPABILITIES[sm]
    with tempfile.TemporaryDirectory(prefix="tensorrt-rtx-") as folder:
        (Path(folder) / _MODEL).symlink_to(path.parent.resolve(), target_is_directory=True)
        request = {"model": path.name, "capability": capability if engine else "", "ranges": ranges}
        done = subprocess.run(
            _command(),
            input=json.dumps(request),
            cwd=folder,
            env=_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise EngineFailed(_death(done), where=str(path), way_out="Build on a machine with more memory.")
        answer = json.loads(done.stdout.splitlines()[-1])
        _raise(path, answer)
        made = (Path(folder) / _ENGINE).read_bytes() if engine else b""
    layers = tuple(Layer(row["name"], row["kind"], tuple(row["nodes"])) for row in answer["layers"])
    return Built(answer["compiler"], request["capability"], own, made, layers)


def _command() -> list[str]:
    """This module as a program. -P: the folder that it runs in, whose name differs, is no place for modules."""
    return [sys.executable, "-P", "-m", "exporters.tensorrt_rtx"]


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return kept | {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "PYTHONHASHSEED": "0"}


def _death(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"the compiler was ended by {signal.Signals(-done.returncode).name}"
    return f"the compiler ended with {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"


def _raise(path: Path, answer: Mapping[str, Any]) -> None:
    if "rejected" in answer:
        raise ParserRejected(
            f"the parser of {answer['compiler']} rejects {answer['rejected']}",
            where=str(path),
            way_out="Take the form out of the profile, or name another version of TensorRT in it.",
        )
    if any(sign in answer.get("failed", "") for sign in _OUT_OF_MEMORY):
        raise EngineFailed(
            f"{answer['compiler']} ran out of memory: {answer['failed']}",
            where=str(path),
            way_out="Build on a machine with more memory.",
        )
    if "failed" in answer:
        raise EngineFailed(
            f"{answer['compiler']} parsed it but built no engine: {answer['failed']}",
            where=str(path),
            way_out="Take the form out of the profile, or report the message to NVIDIA.",
        )


def _build(request: Mapping[str, Any]) -> dict[str, Any]:
    """The child's work: {compiler, layers}, or what was rejected or failed; writes the engine."""
    import tensorrt_rtx as trt

    class Log(trt.ILogger):
        """Keeps the compiler's messages, among which is its list of layers: an engine is only inspected on a GPU."""

        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines += message.splitlines()
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    log = Log()
    answer: dict[str, Any] = {"compiler": f"TensorRT-RTX {trt.__version__}", "layers": []}
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(f"{_MODEL}/{request['model']}"):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        reasons = [f"node {e.node_name() or '?'} ({e.node_operator() or '?'}): {e.desc()}" for e in errors]
        return answer | {"rejected": "; ".join(reasons or log.errors) or "it and gives no reason"}
    if not network.num_outputs:  # an empty file is parsed without complaint
        return answer | {"rejected": "it: there is no graph in the file"}
    if not request["capability"]:
        return answer
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, request["capability"]), 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # a float32 artifact is there because it needs float32
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    for shapes in request["ranges"].values():
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            if -1 in tuple(tensor.shape):
                profile.set_shape(tensor.name, *map(tuple, shapes[tensor.name]))
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return answer | {"failed": "; ".join(log.errors) or "it gives no reason"}
    Path(_ENGINE).write_bytes(bytes(engine))
    return answer | {"layers": [asdict(layer) for layer in _layers(log.lines)]}


def _layers(lines: Sequence[str]) -> list[Layer]:
    found = []
    for line in lines:
        if match := _LAYER.match(line):
            found.append(Layer(match["name"], match["kind"], tuple(_NODE.findall(match["nodes"]))))
    return found


def _fix_addresses() -> None:
    """Starts this program anew without address randomisation (personality(2)), where the system allows it."""
    if sys.platform != "linux":
        return
    personality = ctypes.CDLL(None).personality
    now = personality(_QUERY)
    if now != -1 and not now & _NO_RANDOMIZE and personality(now | _NO_RANDOMIZE) != -1:
        os.execv(sys.executable, _command())


if __name__ == "__main__":
    _fix_addresses()
    print(json.dumps(_build(json.load(sys.stdin))))
