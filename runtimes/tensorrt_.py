"""TensorRT behind the Session protocol: the engine where this machine has one, else ONNX Runtime on the file of it.

An artifact of this backend is the ONNX file that the device builds its engine from (`python -m runtimes.finalize`).
Where there is no engine, ONNX Runtime runs that very file on the CPU, the bodies of its model-local functions in the
place of TensorRT's own layers and of our kernels. That proves the file, not the engine: a stand-in, which says so.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.onnxruntime_ import OnnxRuntimeSession, translated
from runtimes.session import Array, BackendUnavailable, CheckedSession

if TYPE_CHECKING:
    from runtimes.bundle import Artifact, Bundle


class TensorRtSession:
    """Opens what this machine can run of an artifact."""

    @classmethod
    def open(
        cls, bundle: Bundle, artifact: Artifact, *, threads: int | None = None, timing: bool = False
    ) -> CheckedSession:
        """The engine's session, or a stand-in's. Raises WrongEngine, BackendUnavailable."""
        try:
            return FileSession.open(bundle, artifact, threads=threads, timing=timing)
        except ModuleNotFoundError as error:
            raise BackendUnavailable(
                "has no engine here, and ONNX Runtime, which would stand in for it, is not installed",
                f"{artifact.component} ({artifact.label})",
                "Run python -m runtimes.finalize BUNDLE on the device, or: pip install '.[onnx]'",
            ) from error


class FileSession(OnnxRuntimeSession):
    """ONNX Runtime on the file. Where the graph gives only the new rows of a cache, they are written into it here."""

    def __init__(self, session: Any, artifact: Artifact, *arguments: Any, timing: bool = False) -> None:
        super().__init__(session, artifact, *arguments, timing=timing)
        import onnxruntime

        self.stand_in = f"ONNX Runtime {onnxruntime.__version__} on the file that the engine is built from"
        self._delta = artifact.options.get("states") == "delta"

    def _bind_states(self) -> None:
        if self.artifact.options.get("states") != "delta":
            super()._bind_states()
            return
        self._caches = {state.input: np.zeros(state.shape, state.dtype) for state in self.artifact.states}

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        if not self._delta:
            return super()._run(feeds)
        steps = feeds["ids"].shape[1]
        start = time.perf_counter() if self.timing else 0.0
        with translated(self._where, loading=False):
            names = [*self._outputs, *(state.output for state in self.artifact.states)]
            results = dict(zip(names, self._session.run(names, {**feeds, **self._caches}), strict=True))
        if self.timing:
            self.last_run_seconds = time.perf_counter() - start
        for state in self.artifact.states:
            self._caches[state.input][:, :, self.position : self.position + steps] = results[state.output]
        return {name: results[name] for name in self._outputs}
