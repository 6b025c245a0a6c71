"""Core ML itself, on macOS: the engine of `runtimes.coreml_` that runs a package on the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.coreml_format import load_package, stored
from runtimes.errors import Fault

Array = np.ndarray[Any, Any]


class CoreMlFailed(Fault):
    """Core ML could not load or run the package."""


class Device:
    """A package loaded by Core ML, one model per function; its states are made once and shared by all of them.

    Args:
        units: name of a coremltools ComputeUnit, as in "CPU_AND_NE".
    """

    stand_in: str | None = None

    def __init__(self, package: Path, units: str, where: str) -> None:
        import coremltools as ct

        self._where, self._package, self._units = where, package, getattr(ct.ComputeUnit, units)
        programs = load_package(package)  # the same refusals as everywhere: version, missing weights
        self.names = frozenset(programs)
        self._models: dict[str, Any] = {}
        for name in programs:
            self._models[name] = self._guarded(
                lambda name=name: ct.models.MLModel(str(package), compute_units=self._units, function_name=name)
            )
        self._stateful = any(program.states for program in programs.values())
        self._state: Any = None
        self.effective = {"compute units": units, **self._placed(), **stored(programs.values())}
        self.reset()

    def _placed(self) -> dict[str, str]:
        """How many operators Core ML plans for each compute unit, from its own compute plan of the default function."""
        from coremltools.models.compute_plan import MLComputePlan

        first = next(iter(self._models.values()))
        plan = self._guarded(
            lambda: MLComputePlan.load_from_path(str(first.get_compiled_model_path()), compute_units=self._units)
        )
        counts: Counter[str] = Counter()
        for function in plan.model_structure.program.functions.values():
            for operation in function.block.operations:
                usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
                if usage is not None:
                    kind = type(usage.preferred_compute_device).__name__
                    counts[kind.removeprefix("ML").removesuffix("ComputeDevice")] += 1
        return {"operators": ", ".join(f"{count} on {name}" for name, count in counts.most_common())}

    def call(self, name: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """One run of a function."""
        model = self._models[name]
        if self._stateful:
            return self._guarded(lambda: model.predict(dict(feeds), self._state))
        return self._guarded(lambda: model.predict(dict(feeds)))

    def reset(self) -> None:
        """New states, which Core ML fills with zeros."""
        if self._stateful:
            self._state = self._guarded(next(iter(self._models.values())).make_state)

    def close(self) -> None:
        """Releases the models."""
        self._models, self._state = {}, None

    def _guarded(self, call: Any) -> Any:
        try:
            return call()
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            raise CoreMlFailed(f"Core ML: {error}", self._where, "See the versions in the manifest.") from error
