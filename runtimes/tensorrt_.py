"""TensorRT behind the Session protocol: the engine where this machine has one, else a stand-in for it.

An artifact of this backend is the ONNX file that the device builds its engine from (`python -m runtimes.finalize`), or,
for TensorRT-RTX, an engine that came with the bundle. Where no GPU is there, ONNX Runtime runs the file on the CPU
(runtimes/tensorrt_emulated.py) and says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtimes import engines
from runtimes.session import BackendUnavailable, CheckedSession
from runtimes.tensorrt_engine import EngineSession

if TYPE_CHECKING:
    from runtimes.bundle import Artifact, Bundle


class TensorRtSession:
    """Opens what this machine can run of an artifact."""

    @classmethod
    def open(
        cls, bundle: Bundle, artifact: Artifact, *, threads: int | None = None, timing: bool = False
    ) -> CheckedSession:
        """The engine's session, or a stand-in's.

        Raises:
            WrongEngine: there is an engine, and it is not of this machine or this bundle.
            BackendUnavailable: there is none, and ONNX Runtime is not installed either.
        """
        if engines.held(bundle, artifact):
            return EngineSession.open(bundle, artifact, threads=threads, timing=timing)
        if "engine" in artifact.options:
            try:
                return EngineSession.open(bundle, artifact, threads=threads, timing=timing)
            except BackendUnavailable:  # no GPU here: the file stands in
                pass
        from runtimes.tensorrt_emulated import FileSession

        try:
            return FileSession.open(bundle, artifact, threads=threads, timing=timing)
        except ModuleNotFoundError as error:
            raise BackendUnavailable(
                "has no engine here, and ONNX Runtime, which would stand in for it, is not installed",
                f"{artifact.component} ({artifact.label})",
                "Run python -m runtimes.finalize BUNDLE on the device, or: pip install '.[onnx]'",
            ) from error
