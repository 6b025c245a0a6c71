"""Reference session: an eager torch callable behind the protocol that the vendor runtimes have.

The one module of the device side that may load torch, and only inside its functions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from runtimes.errors import Fault
from runtimes.session import Array, CheckedSession, Limits, OutOfDeviceMemory, limits_of

if TYPE_CHECKING:
    import torch

    from runtimes.bundle import Artifact, Bundle

Step = Callable[..., "torch.Tensor | tuple[torch.Tensor, ...]"]


class TorchSession(CheckedSession):
    """Wraps `step(*inputs, *states) -> (*outputs, *new states)`, each in the artifact's order.

    The states start as zeros and stay in place: a step that updates the tensors it was given may return those same
    tensors, and any other returned state is copied into the held one.
    """

    def __init__(self, step: Step, artifact: Artifact, limits: Limits, *, timing: bool = False) -> None:
        import torch

        super().__init__(artifact, limits, timing=timing)
        self._step: Step | None = step
        self._states = [torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in artifact.states]

    @classmethod
    def open(cls, bundle: Bundle, artifact: Artifact, *, threads: int | None = None, timing: bool = False) -> Self:
        """Loads a program saved by torch.export.save (.pt2). `threads` sets torch's number for the whole process."""
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        program = torch.export.load(bundle.file(artifact.model))
        return cls(program.module(), artifact, limits_of(bundle, artifact), timing=timing)

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        import torch

        assert self._step is not None  # CheckedSession lets nothing in after close
        inputs = [torch.from_numpy(feeds[spec.name]) for spec in self.artifact.inputs]
        start = time.perf_counter() if self.timing else 0.0
        try:
            with torch.inference_mode():
                returned = self._step(*inputs, *self._states)
                results = returned if isinstance(returned, tuple) else (returned,)
                outputs = self._split(results)
        except RuntimeError as error:
            # The allocator of the CPU has no exception class of its own.
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise OutOfDeviceMemory(str(error), self._where, "Use a smaller batch or a shorter input") from error
        if self.timing:
            self.last_run_seconds = time.perf_counter() - start
        return outputs

    def _split(self, results: tuple[Any, ...]) -> dict[str, Array]:
        """Keeps the new states, and returns the outputs by name."""
        names = [spec.name for spec in self.artifact.outputs]
        if len(results) != len(names) + len(self._states):
            raise Fault(
                f"{len(results)} results for {len(names)} outputs and {len(self._states)} states",
                self._where,
                "Build the bundle again",
            )
        for held, new in zip(self._states, results[len(names) :], strict=True):
            if new.data_ptr() != held.data_ptr():
                held.copy_(new)
        return {name: np.asarray(result.detach().numpy()) for name, result in zip(names, results, strict=False)}

    def _reset(self) -> None:
        for state in self._states:
            state.zero_()

    def _close(self) -> None:
        self._step = None
        self._states.clear()
