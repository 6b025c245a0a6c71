"""Our kernels in TensorRT's plugin registry, on the device: ahead-of-time plugins where TensorRT has them, else the C++
library, built here from the bundle's sources against this machine's TensorRT.

    registered = register(bundle, artifact, tensorrt, bundle.folder / "engines")
    model = strip_functions(model, registered.ops)      # the plugins take the functions' place
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtimes.errors import MAKE_AGAIN, Fault
from runtimes.tensorrt_aot import NotAheadOfTime, multiprocessors, register_ops
from runtimes.tensorrt_ops import Op, load_ops

if TYPE_CHECKING:
    from runtimes.bundle import Artifact, Bundle

NAMESPACE, VERSION = "edge", "1"
SOURCES, KERNELS = "tensorrt/plugin", "tensorrt/kernels"
TABLE = f"{SOURCES}/library/ops.txt"
LIBRARY = "libedge_plugins.so"
#: Which packaging a version of TensorRT takes, newest first.
PACKAGINGS = (((10, 9), "ahead-of-time"), ((10, 3), "library"))
_UNITS = (*(f"library/{name}.cpp" for name in ("driver", "edge_kernels", "ops", "table")), "tensorrt/plugin.cpp")
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-fvisibility-inlines-hidden")
_BUILD_SECONDS = 600
_COMPILER = "Install g++ 11 or newer and TensorRT's own headers, and run it again"


class MissingPlugin(Fault):
    """An op of the model that no plugin here computes."""


class PluginBuildFailed(Fault):
    """The plugin library could not be built or loaded on this machine."""


class BrokenModel(Fault):
    """Bytes that are not a serialised ONNX model."""


@dataclass(frozen=True)
class Registered:
    """What `register` did: the op types that TensorRT now knows; "ahead-of-time", "library" or "none"; and, where there
    is one, the library's file, to be hashed into the engine's sidecar."""

    ops: tuple[str, ...]
    packaging: str
    library: Path | None = None


def register(
    bundle: Bundle, artifact: Artifact, tensorrt: Any, folder: Path, packaging: str | None = None
) -> Registered:
    """Makes TensorRT know every op of the artifact's ``options["plugins"]``, once a process.

    Args:
        bundle: verified; has the kernels' PTX and the plugin's sources.
        tensorrt: the imported module.
        folder: where libedge_plugins.so is, or is built.
        packaging: instead of the one that the version prefers, as after a NotAheadOfTime while building.

    Raises:
        MissingPlugin: no plugin for an op, or TensorRT is older than 10.3; names them and the way out.
        PluginBuildFailed: the compiler's or the loader's words.
    """
    needed = tuple(artifact.options.get("plugins", ()))
    if not needed:
        return Registered((), "none")
    where = f"{artifact.component} ({artifact.label})"
    ops = load_ops(bundle.file(TABLE))
    unknown = [name for name in needed if name not in ops]
    if unknown:
        raise MissingPlugin(
            f"needs {', '.join(unknown)}, which its plugins do not have", where, "Make the bundle again"
        )
    ptx = bundle.file(f"{KERNELS}/edge_{artifact.options['sm']}.ptx")
    packaging = packaging or packaging_of(str(tensorrt.__version__), where)
    library = None
    if packaging == "ahead-of-time":
        try:
            _register_ahead_of_time([ops[name] for name in needed], ptx, tensorrt)
        except NotAheadOfTime:
            packaging = "library"
    if packaging == "library":
        library = built_library(bundle.folder / SOURCES, folder, str(tensorrt.__version__))
        _load(library, ptx, tensorrt)
    registry = tensorrt.get_plugin_registry()
    absent = [name for name in needed if registry.get_creator(name, VERSION, NAMESPACE) is None]
    if absent:
        raise MissingPlugin(
            f"TensorRT's registry has no plugin for {', '.join(absent)}",
            where,
            f"Remove {folder / LIBRARY} and run again, or use the artifact of form typed",
        )
    return Registered(needed, packaging, library)


def packaging_of(version: str, where: str = "TensorRT") -> str:
    """The packaging that a TensorRT of this version takes. Raises MissingPlugin for one before 10.3."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    for since, packaging in PACKAGINGS:
        if numbers and (int(numbers[1]), int(numbers[2])) >= since:
            return packaging
    raise MissingPlugin(
        f"TensorRT {version} takes none of our plugins", where, "Use 10.3 or newer, or the artifact of form typed"
    )


def _register_ahead_of_time(ops: list[Op], ptx: Path, tensorrt: Any) -> None:
    registry = tensorrt.get_plugin_registry()
    fresh = [op for op in ops if registry.get_creator(op.name, VERSION, NAMESPACE) is None]
    if fresh:
        register_ops(fresh, ptx.read_text("ascii"), multiprocessors(), tensorrt)


# --- the library ----------------------------------------------------------------------------------------------------
def _load(library: Path, ptx: Path, tensorrt: Any) -> None:
    """The PTX first: engines that are deserialised later find their kernels by it."""
    try:
        loaded = ctypes.CDLL(str(library))
        loaded.edge_message.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise PluginBuildFailed(f"cannot be loaded ({error})", str(library), "Remove it and run again") from error
    if loaded.edge_set_kernels(os.fsencode(ptx)):
        raise PluginBuildFailed(loaded.edge_message().decode(errors="replace"), str(ptx), "Fetch the bundle again")
    registry = tensorrt.get_plugin_registry()
    if registry.get_creator("EdgeLinear", VERSION, NAMESPACE) is None and registry.load_library(str(library)) is None:
        raise PluginBuildFailed("TensorRT does not load it", str(library), "Remove it and run again")


def built_library(sources: Path, folder: Path, tensorrt_version: str) -> Path:
    """``folder``/libedge_plugins.so, built unless the one there is of these sources, machine and version.

    Raises:
        PluginBuildFailed: no compiler, no headers, or the compiler's words.
    """
    library, key = folder / LIBRARY, build_key(sources, tensorrt_version)
    if library.is_file() and f"edge-build:{key}".encode() in library.read_bytes():
        return library
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "c++", "g++", "clang++"))), None)
    if compiler is None:
        raise PluginBuildFailed("no C++ compiler, which builds the plugins", str(sources), "Run apt install g++")
    includes = [
        _include("NvInferRuntime.h", "TensorRT_ROOT", "Run apt install libnvinfer-headers-dev"),
        _include("cuda_runtime_api.h", "CUDA_ROOT", "Install the CUDA toolkit"),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
        made = Path(scratch) / LIBRARY
        command = [compiler, *_FLAGS, f'-DEDGE_BUILD="{key}"', f"-ffile-prefix-map={sources}=."]
        command += [part for include in includes for part in ("-isystem", str(include))]
        command += [*(str(sources / unit) for unit in _UNITS), "-o", str(made), "-ldl"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise PluginBuildFailed(
                f"the compiler ran longer than {_BUILD_SECONDS} s", str(sources), _COMPILER
            ) from error
        if done.returncode:
            words = "\n".join(done.stderr.strip().splitlines()[:20])
            raise PluginBuildFailed(f"{Path(compiler).name} refuses the plugins:\n{words}", str(sources), _COMPILER)
        made.replace(library)
    return library


def build_key(sources: Path, tensorrt_version: str) -> str:
    """What a built library depends on: the sources' bytes, the machine, and TensorRT's version."""
    digest = hashlib.sha256(f"{platform.machine()} {sys.platform} TensorRT {tensorrt_version}".encode())
    for path in sorted(path for path in sources.rglob("*") if path.is_file()):
        digest.update(f"\0{path.relative_to(sources).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _include(header: str, variable: str, way_out: str) -> Path:
    roots = [Path(os.environ[variable])] if os.environ.get(variable) else []
    roots += map(Path, ("/usr", "/usr/local/tensorrt", "/opt/tensorrt", "/usr/local/cuda"))
    for root in roots:
        for folder in (root / "include", root / "include" / f"{platform.machine()}-linux-gnu"):
            if (folder / header).is_file():
                return folder
    raise PluginBuildFailed(f"{header}, which the plugins need, is not here", variable, f"{way_out}, or set {variable}")


# --- the model ------------------------------------------------------------------------------------------------------
# Fields of onnx.proto: ModelProto.functions = 25, FunctionProto.name = 1, FunctionProto.domain = 10.
_FUNCTIONS, _NAME, _DOMAIN = 25, 1, 10


def strip_functions(model: bytes, names: Collection[str]) -> bytes:
    """A serialised ModelProto without its functions of domain "edge" that are called one of ``names``.

    Everything else keeps its bytes and order, so that paths of external data hold. A function that is asked for and not
    there is no fault.

    Raises:
        BrokenModel: the bytes are not a sequence of protobuf fields.
    """
    view = memoryview(model)
    kept = []
    for number, start, value, end in _fields(view):
        if number == _FUNCTIONS and value is not None and _is_ours(view[value:end], names):
            continue
        kept.append(view[start:end])
    return b"".join(kept)


def _is_ours(function: memoryview, names: Collection[str]) -> bool:
    texts = {number: bytes(function[value:end]) for number, _, value, end in _fields(function) if value is not None}
    return texts.get(_DOMAIN) == NAMESPACE.encode() and texts.get(_NAME, b"").decode(errors="replace") in names


def _fields(data: memoryview) -> Iterator[tuple[int, int, int | None, int]]:
    """Number, start, start of the payload (None unless the field is of bytes) and end of each field.

    Source of the format: https://protobuf.dev/programming-guides/encoding/.
    """
    at = 0
    while at < len(data):
        start = at
        tag, at = _varint(data, at)
        number, kind, value = tag >> 3, tag & 7, None
        if kind == 0:
            _, at = _varint(data, at)
        elif kind == 2:
            size, value = _varint(data, at)
            at = value + size
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise BrokenModel(f"byte {start} begins a field of an unknown kind ({kind})", "ONNX model", MAKE_AGAIN)
        if number == 0 or at > len(data):
            raise BrokenModel(f"the field at byte {start} does not end", "ONNX model", MAKE_AGAIN)
        yield number, start, value, at


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise BrokenModel(f"the number before byte {at} does not end", "ONNX model", MAKE_AGAIN)
