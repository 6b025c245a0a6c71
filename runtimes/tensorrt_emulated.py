"""ONNX Runtime in TensorRT's place, on the very file that an engine is built from.

The bodies of the file's model-local functions stand for TensorRT's own layers and for our kernels. This proves the
file (graph, weights, states), not the engine: what passes is a proxy, and says so.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.onnxruntime_ import OnnxRuntimeSession, translated
from runtimes.session import Array, Limits

if TYPE_CHECKING:
    from runtimes.bundle import Artifact


class FileSession(OnnxRuntimeSession):
    """ONNX Runtime on the file. Where the graph gives only the new rows of a cache, they are written into it here; a
    head that picks among a range of rows gets the whole vocabulary."""

    def __init__(self, session: Any, artifact: Artifact, limits: Limits, *, timing: bool = False) -> None:
        head = artifact.options.get("head")
        self._head: dict[str, Any] = head or {}
        self._rows = np.array([0, limits.high.get("ids", 0)], np.int32)
        self._caches: dict[str, Array] = {}
        super().__init__(session, artifact, limits, timing=timing)
        import onnxruntime

        self.candidates = head["k"] if head else 0
        self.stand_in = f"ONNX Runtime {onnxruntime.__version__} on the file that the engine is built from"

    def _bind_states(self) -> None:
        if self.artifact.options.get("states") == "delta":
            self._caches = {state.input: np.zeros(state.shape, state.dtype) for state in self.artifact.states}
        else:
            super()._bind_states()

    def _binding(self, feeds: dict[str, Array]) -> Any:
        return super()._binding({**feeds, self._head["rows"]: self._rows} if self._head else feeds)

    def _run_top(self, feeds: dict[str, Array], first: int, end: int) -> tuple[Array, Array]:
        self._rows[:] = first, end
        try:
            binding = self._binding(feeds)
            for name in ("values", "ids"):
                binding.bind_output(self._head[name])
            with translated(self._where, loading=False):
                self._session.run_with_iobinding(binding)
        finally:
            self._rows[:] = 0, self._vocabulary
        values, ids = binding.get_outputs()[-2:]
        return values.numpy()[0], ids.numpy()[0]

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        if not self._caches:
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
