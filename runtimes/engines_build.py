"""Builds an engine from an artifact's ONNX file, by TensorRT's Python package or by its command `trtexec`."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtimes import engines
from runtimes.bundle import Artifact, Bundle
from runtimes.cuda_driver import Driver
from runtimes.engines import Machine
from runtimes.errors import Fault
from runtimes.files import storage_errors, write_durably
from runtimes.session import OutOfDeviceMemory
from runtimes.tensorrt_aot import NotAheadOfTime
from runtimes.tensorrt_plugins import Registered, register, strip_functions

_OUT_OF_MEMORY = ("out of memory", "outofmemory", "cudaerrormemoryallocation")
_LINES = 5


class ParserRejected(Fault):
    """TensorRT's parser does not take a node of the file."""


class BuildFailed(Fault):
    """TensorRT parsed the file and built no engine."""


def build_engine(bundle: Bundle, artifact: Artifact, tensorrt: Any, workspace_mib: int | None) -> tuple[bytes, str]:
    """The engine, and how its plugins came ("none", "library" or "ahead-of-time").

    Raises:
        ParserRejected: naming node and operator. BuildFailed. OutOfDeviceMemory. MissingPlugin.
    """
    folder = bundle.folder / engines.FOLDER
    try:
        return _built(bundle, artifact, tensorrt, workspace_mib, register(bundle, artifact, tensorrt, folder))
    except NotAheadOfTime:  # a launch that only the library can make, such as one with much shared memory
        registered = register(bundle, artifact, tensorrt, folder, packaging="library")
        return _built(bundle, artifact, tensorrt, workspace_mib, registered)


def _built(
    bundle: Bundle, artifact: Artifact, tensorrt: Any, workspace_mib: int | None, registered: Registered
) -> tuple[bytes, str]:
    where = f"{artifact.component} ({artifact.label})"
    log = _logger(tensorrt)
    builder = tensorrt.Builder(log)
    typed = getattr(tensorrt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 knows nothing else
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = tensorrt.OnnxParser(network, log)
    model = bundle.file(artifact.model)
    # Weights lie beside the model; the path tells the parser where.
    if not parser.parse(_bytes(model, registered), str(model)):
        raise _rejection(parser, log, where)
    config = builder.create_builder_config()
    if workspace_mib is not None:
        config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, workspace_mib << 20)
    config.clear_flag(tensorrt.BuilderFlag.TF32)  # a float32 artifact is there because it needs float32
    config.profiling_verbosity = tensorrt.ProfilingVerbosity.DETAILED
    if registered.packaging != "none":  # caches are updated in place
        feature = getattr(tensorrt.PreviewFeature, "ALIASED_PLUGIN_IO_10_03", None)
        if feature is not None:
            config.set_preview_feature(feature, True)
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    for shapes in artifact.options["ranges"].values():
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            if -1 in tuple(tensor.shape):
                profile.set_shape(tensor.name, *map(tuple, shapes[tensor.name]))
        config.add_optimization_profile(profile)
    cache = _timing_cache(bundle, config)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise _failure(log.errors, where)
    if cache is not None:
        _keep(bundle, bytes(cache.serialize()))
    return bytes(engine), registered.packaging


def _bytes(model: Path, registered: Registered) -> bytes:
    """The file, without the functions whose place our plugins take."""
    return strip_functions(model.read_bytes(), registered.ops) if registered.ops else model.read_bytes()


def _logger(tensorrt: Any) -> Any:
    class Log(tensorrt.ILogger):
        """Keeps what the vendor calls an error, for the message."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (tensorrt.ILogger.Severity.ERROR, tensorrt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()


def _timing_cache(bundle: Bundle, config: Any) -> Any:
    """Timings of an earlier build; one of another version or GPU is not taken, and a new one begun."""
    path = bundle.folder / engines.TIMING_CACHE
    held = path.read_bytes() if path.is_file() else b""
    for content in (held, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    return None


def _keep(bundle: Bundle, timings: bytes) -> None:
    path = bundle.folder / engines.TIMING_CACHE
    with storage_errors(path):
        path.parent.mkdir(exist_ok=True)
        write_durably(path, timings)


def _rejection(parser: Any, log: Any, where: str) -> ParserRejected:
    found = [parser.get_error(index) for index in range(parser.num_errors)]
    nodes = [f"node {error.node_name() or '?'} ({error.node_operator() or '?'}): {error.desc()}" for error in found]
    what = "; ".join(nodes or log.errors) or "it, and gives no reason"
    return ParserRejected(f"the parser rejects {what}", where, "Use the artifact of another form, or update TensorRT")


def _failure(errors: Sequence[str], where: str) -> Fault:
    text = "; ".join(errors[:_LINES]) or "TensorRT gives no reason"
    if any(sign in text.lower().replace("_", "") for sign in _OUT_OF_MEMORY):
        return OutOfDeviceMemory(f"out of memory while building: {text}", where, "Give less with --workspace-mib")
    return BuildFailed(f"no engine: {text}", where, "Use the artifact of another form, or update TensorRT")


def build_with_trtexec(bundle: Bundle, artifacts: Sequence[Artifact], driver: Driver, tool: Path) -> Machine:
    """Builds by the vendor's command where its Python package is missing; artifacts with plugins need the package.

    The engines can be used once the package is there: it is what a session runs them with.

    Raises:
        BuildFailed, OutOfDeviceMemory: with the command's last words.
    """
    found = shutil.which(str(tool))
    if found is None:
        raise BuildFailed("is not there", str(tool), "Give the path of trtexec, as /usr/src/tensorrt/bin/trtexec")
    version = subprocess.run([found, "--help"], capture_output=True, text=True, timeout=60, check=False).stdout
    machine = Machine(
        f"TensorRT {_version(version)}", driver.sm, driver.name, driver.uuid, driver.cuda, engines.this_system()
    )
    for artifact in artifacts:
        label = f"{artifact.component} ({artifact.label})"
        if artifact.options.get("plugins"):
            print(f"{label}: left out: its plugins need TensorRT's Python package")
            continue
        with tempfile.TemporaryDirectory() as scratch:
            target = Path(scratch) / "engine"
            command = trtexec_command(found, bundle, artifact, target)
            done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
            if done.returncode or not target.is_file():
                raise _failure([line for line in done.stdout.splitlines() if "[E]" in line][-_LINES:], label)
            engines.store(bundle, artifact, target.read_bytes(), machine)
            print(f"{label}: built by trtexec")
    return machine


def _version(text: str) -> str:
    """Of the banner "&&&& RUNNING TensorRT.trtexec [TensorRT v100300]": two digits each for minor and patch."""
    digits = next((part for part in text.replace("]", " ").split() if part[:1] == "v" and part[1:].isdigit()), "v0")
    number = int(digits[1:])
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def trtexec_command(tool: str, bundle: Bundle, artifact: Artifact, target: Path) -> list[str]:
    """The command line: one `--profile` for each shape range."""
    command = [tool, f"--onnx={bundle.file(artifact.model)}", f"--saveEngine={target}", "--stronglyTyped", "--noTF32"]
    command += ["--skipInference", f"--timingCacheFile={bundle.folder / engines.TIMING_CACHE}"]
    for index, shapes in enumerate(artifact.options["ranges"].values()):
        command.append(f"--profile={index}")
        for which, flag in enumerate(("minShapes", "optShapes", "maxShapes")):
            text = ",".join(f"{name}:{'x'.join(map(str, sizes[which]))}" for name, sizes in shapes.items())
            command.append(f"--{flag}={text}")
    return command
