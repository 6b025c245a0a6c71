"""ONNX Runtime as the engine behind an EngineSession."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime

from runtimes.bundle import Artifact, Bundle

Array = np.ndarray[Any, Any]


class OnnxEngine:
    """The Engine protocol over an artifact's file: caches that are written in place, or by their new rows."""

    effective: Mapping[str, str] = {"activations": "float16"}

    def __init__(self, bundle: Bundle, artifact: Artifact, longest: int) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # else activations are int8
        self._session = onnxruntime.InferenceSession(bundle.file(artifact.model), options)
        self._artifact, self.longest = artifact, longest
        # Whatever an earlier sequence left there must not matter.
        self._caches = {s.input: np.full(s.shape, 7, s.dtype) for s in artifact.states}
        self.runs: list[tuple[int, int, tuple[str, ...]]] = []

    def step(self, feeds: Mapping[str, Array], position: int, wanted: Sequence[str]) -> dict[str, Array]:
        states = self._artifact.states
        self.runs.append((position, feeds["ids"].shape[1] if states else 0, tuple(wanted)))
        names = [*wanted, *(state.output for state in states)]
        results = dict(zip(names, self._session.run(names, {**feeds, **self._caches}), strict=True))
        for state in states:
            new = results.pop(state.output)
            if self._artifact.options["states"] == "delta":
                self._caches[state.input][:, :, position : position + new.shape[2]] = new
            else:
                self._caches[state.input] = new
        return results

    def close(self) -> None:
        self._caches = {}
