"""Builds an engine from an artifact's ONNX file, by TensorRT's Python package or by its command `trtexec`."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from runtimes import engines
from runtimes.bundle import Artifact, Bundle
from runtimes.errors import Fault
from runtimes.files import storage_errors, write_durably
from runtimes.tensorrt_log import failure, logger, summary
from runtimes.tensorrt_options import options_of
from runtimes.tensorrt_plugins import Registered, register, strip_functions

_OTHER_FORM = "Use the artifact of another form, or update TensorRT"
_LAST_LINES = 3  # of a command that marks none as its error
_BUILD_SECONDS = 4 * 3600  # of a large model on a small board


class ParserRejected(Fault):
    """TensorRT's parser does not take a node of the file."""


class BuildFailed(Fault):
    """TensorRT parsed the file and built no engine."""


class NeedsPackage(Fault):
    """An artifact that only TensorRT's Python package can build, for its plugins are registered by it."""


def build_engine(bundle: Bundle, artifact: Artifact, tensorrt: Any, workspace_mib: int | None) -> tuple[bytes, str]:
    """The engine, and how its plugins came ("none", "library" or "ahead-of-time").

    Raises:
        ParserRejected: naming node and operator. BuildFailed. OutOfDeviceMemory. MissingPlugin.
    """
    registered = register(bundle, artifact, tensorrt, bundle.folder / engines.FOLDER)
    where = f"{artifact.component} ({artifact.label})"
    log = logger(tensorrt)
    builder = tensorrt.Builder(log)
    typed = getattr(tensorrt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 knows nothing else
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = tensorrt.OnnxParser(network, log)
    model = bundle.file(artifact.model)
    # Weights lie beside the model; the path tells the parser where.
    if not parser.parse(_bytes(model, registered), str(model)):
        raise _rejection(parser, log.errors, where)
    if not network.num_outputs:  # an empty file is parsed without complaint
        raise ParserRejected("the parser finds no graph in the file", where, "Fetch or build the bundle again")
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
    for shapes in options_of(artifact).ranges.values():
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            if -1 in tuple(tensor.shape):
                profile.set_shape(tensor.name, *shapes[tensor.name])
        config.add_optimization_profile(profile)
    cache = None if tensorrt.__name__ == "tensorrt_rtx" else _timing_cache(bundle, config)  # that one times nothing
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise _failed(log.errors, where)
    if cache is not None:
        _keep(bundle, bytes(cache.serialize()))
    return bytes(engine), registered.packaging


def _bytes(model: Path, registered: Registered) -> bytes:
    """The file, without the functions whose place our plugins take."""
    return strip_functions(model.read_bytes(), registered.ops) if registered.ops else model.read_bytes()


def _timing_cache(bundle: Bundle, config: Any) -> Any:
    """Timings of an earlier build on this machine (see `engines.discard_foreign`); those of another version or GPU are
    not taken, and new ones begun."""
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


def _rejection(parser: Any, errors: list[str], where: str) -> ParserRejected:
    found = [parser.get_error(index) for index in range(parser.num_errors)]
    nodes = [f"node {error.node_name() or '?'} ({error.node_operator() or '?'}): {error.desc()}" for error in found]
    what = "; ".join(nodes or errors) or "it, and gives no reason"
    return ParserRejected(f"the parser rejects {what}", where, _OTHER_FORM)


def _failed(errors: list[str], where: str) -> Fault:
    return failure(errors, "building", where, BuildFailed(f"no engine: {summary(errors)}", where, _OTHER_FORM))


# --- trtexec --------------------------------------------------------------------------------------------------------
def find_trtexec(tool: Path) -> tuple[str, str]:
    """The command, and its version as in "10.3.0". Raises BuildFailed where it is not there or does not say."""
    way_out = "Give the path of trtexec, as /usr/src/tensorrt/bin/trtexec"
    found = shutil.which(str(tool))
    if found is None:
        raise BuildFailed("is not there, or no program", str(tool), way_out)
    try:
        done = subprocess.run([found, "--help"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailed(f"does not answer ({error})", found, way_out) from error
    version = trtexec_version(done.stdout)
    if version is None:
        raise BuildFailed("does not say its version", found, way_out)
    return found, version


def trtexec_version(text: str) -> str | None:
    """Of the banner "&&&& RUNNING TensorRT.trtexec [TensorRT v100300]": two digits each for minor and patch."""
    match = re.search(r"\[TensorRT v(\d{6})\]", text)
    if match is None:
        return None
    number = int(match[1])
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def build_with_trtexec(
    bundle: Bundle, artifact: Artifact, tool: str, workspace_mib: int | None = None
) -> tuple[bytes, str]:
    """As `build_engine`, by the vendor's command; a session still needs the package to run the engine.

    Raises:
        BuildFailed, OutOfDeviceMemory: with the command's last words.
        NeedsPackage: the artifact has plugins.
    """
    where = f"{artifact.component} ({artifact.label})"
    if options_of(artifact).plugins:
        raise NeedsPackage("its plugins need TensorRT's Python package", where, "Install it, or use the form typed")
    kept = bundle.folder / engines.TIMING_CACHE
    with tempfile.TemporaryDirectory() as scratch, storage_errors(Path(scratch)):
        target, timings = Path(scratch) / "engine", Path(scratch) / "timing.cache"
        if kept.is_file():
            timings.write_bytes(kept.read_bytes())
        command = trtexec_command(tool, bundle, artifact, target, timings, workspace_mib)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise BuildFailed(f"no engine within {_BUILD_SECONDS} s", where, _OTHER_FORM) from error
        if done.returncode or not target.is_file():
            lines = list(filter(str.strip, f"{done.stdout}\n{done.stderr}".splitlines()))
            raise _failed([line for line in lines if "[E]" in line] or lines[-_LAST_LINES:], where)
        if timings.is_file():
            _keep(bundle, timings.read_bytes())
        return target.read_bytes(), "none"


def trtexec_command(
    tool: str, bundle: Bundle, artifact: Artifact, target: Path, timings: Path, workspace_mib: int | None = None
) -> list[str]:
    """The command line: one `--profile` for each shape range."""
    command = [tool, f"--onnx={bundle.file(artifact.model)}", f"--saveEngine={target}", "--stronglyTyped", "--noTF32"]
    command += ["--skipInference", f"--timingCacheFile={timings}"]
    if workspace_mib is not None:
        command.append(f"--memPoolSize=workspace:{workspace_mib}")
    for index, shapes in enumerate(options_of(artifact).ranges.values()):
        command.append(f"--profile={index}")
        for which, flag in enumerate(("minShapes", "optShapes", "maxShapes")):
            text = ",".join(f"{name}:{'x'.join(map(str, sizes[which]))}" for name, sizes in shapes.items())
            command.append(f"--{flag}={text}")
    return command
