"""An engine of TensorRT or TensorRT-RTX as a `Plan`: the vendor's calls, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.engines import WrongEngine
from runtimes.errors import Fault
from runtimes.files import open_plain, write_durably
from runtimes.machine_key import state_folder
from runtimes.manifest import Artifact, BundleError
from runtimes.tensorrt_log import failure, logger, summary
from runtimes.tensorrt_options import Shape, options_of

_AGAIN = "Run python -m runtimes.finalize BUNDLE on this machine"


class TensorRtPlan:
    """See runtimes.device_engine.Plan. The bytes are trusted: they come from `engines.read`."""

    def __init__(self, engine: bytes, artifact: Artifact, tensorrt: Any, stream: int) -> None:
        """Raises WrongEngine, OutOfDeviceMemory naming the stage."""
        self._tensorrt, self._stream = tensorrt, stream
        self._where = f"{artifact.component} ({artifact.label})"
        self._log = logger(tensorrt)
        self._runtime = tensorrt.Runtime(self._log)  # must outlive the engine
        self._engine = self._runtime.deserialize_cuda_engine(engine)
        if self._engine is None:
            title = f"{tensorrt.__name__} {tensorrt.__version__}"
            raise self._failed("loading the engine", f"{title} does not take the engine", WrongEngine)
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        types = {name: np.dtype(tensorrt.nptype(self._engine.get_tensor_dtype(name))) for name in names}
        shapes = [name for name in names if self._engine.is_shape_inference_io(name)]
        if shapes:
            # It would be read from the host's memory while a run is put into the stream, and be lost in a recording.
            raise WrongEngine(f"takes the values of {shapes[0]!r} for shapes", self._where, _AGAIN)
        is_input = {n: self._engine.get_tensor_mode(n) == tensorrt.TensorIOMode.INPUT for n in names}
        self.inputs: Mapping[str, np.dtype[Any]] = {name: types[name] for name in names if is_input[name]}
        self.outputs: Mapping[str, np.dtype[Any]] = {name: types[name] for name in names if not is_input[name]}
        self.effective: Mapping[str, str] = {
            "activations": str(artifact.precision.get("activations", "float32")),
            "TensorRT": str(tensorrt.__version__),
        }
        self._kernels = _KernelCache(engine, self._engine) if tensorrt.__name__ == "tensorrt_rtx" else None
        self._contexts = [self._context(index) for index in range(len(options_of(artifact).ranges))]

    def _context(self, index: int) -> Any:
        context = self._kernels.context() if self._kernels else self._sized_context()
        if context is None or not context.set_optimization_profile_async(index, self._stream):
            raise self._failed("making an execution context", "there is no execution context", Fault)
        return context

    def _sized_context(self) -> Any:
        """With scratch memory for its own shape range; by default each context has enough for the largest of all."""
        strategies = getattr(self._tensorrt, "ExecutionContextAllocationStrategy", None)
        strategy = getattr(strategies, "ON_PROFILE_CHANGE", None)
        if strategy is None:
            return self._engine.create_execution_context()
        return self._engine.create_execution_context(strategy)

    def set_shape(self, context: int, name: str, shape: Shape) -> None:
        if not self._contexts[context].set_input_shape(name, shape):
            raise self._failed("setting a shape", f"takes no {list(shape)} for {name!r}", Fault)

    def shape(self, context: int, name: str) -> Shape:
        return tuple(self._contexts[context].get_tensor_shape(name))

    def bind(self, context: int, name: str, address: int) -> None:
        if not self._contexts[context].set_tensor_address(name, address):
            raise self._failed("binding memory", f"takes no memory for {name!r}", Fault)

    def enqueue(self, context: int) -> None:
        if not self._contexts[context].execute_async_v3(self._stream):
            raise self._failed("running the engine", "the engine refused to run", Fault)

    def capturable(self, context: int) -> bool:
        """True where this version of TensorRT has no such question: then it has none but capturable engines."""
        ask = getattr(self._contexts[context], "is_stream_capturable", None)
        return ask is None or bool(ask(self._stream))

    def _failed(self, stage: str, what: str, kind: type[Fault]) -> Fault:
        errors, self._log.errors = self._log.errors, []
        return failure(errors, stage, self._where, kind(f"{what}: {summary(errors)}", self._where, _AGAIN))

    def close(self) -> None:
        """Keeps the compiled kernels, where there are such; then releases in the vendor's order."""
        if self._kernels:
            self._kernels.keep()
        self._contexts, self._kernels, self._engine, self._runtime = [], None, None, None


class _KernelCache:
    """Kernels that TensorRT-RTX compiles on the device, kept for the next time.

    They are code, so they lie in the user's own state folder and not in the bundle, which may come from anywhere; the
    vendor's library refuses those of another version, GPU or driver, and they are then compiled again.
    """

    def __init__(self, engine: bytes, loaded: Any) -> None:
        self._path: Path = state_folder() / "kernels" / f"{hashlib.sha256(engine).hexdigest()}.cache"
        self._loaded, self._config = loaded, loaded.create_runtime_config()
        self._cache, self._held = self._config.create_runtime_cache(), b""
        with suppress(OSError, BundleError), open(open_plain(self._path), "rb") as file:
            self._held = file.read()
            self._cache.deserialize(self._held)
        self._config.set_runtime_cache(self._cache)

    def context(self) -> Any:
        """A context whose kernels come from the cache or go into it."""
        return self._loaded.create_execution_context(runtime_config=self._config)

    def keep(self) -> None:
        """Writes what is new. A disk that refuses costs the next start some time, and nothing else."""
        compiled = bytes(self._cache.serialize())
        if compiled != self._held:
            with suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                write_durably(self._path, compiled)
