"""Core ML behind the Session protocol: Core ML itself on macOS, an interpreter of the saved package elsewhere.

The artifact's options: `functions` maps a compiled length of the language model (as text) to a function of the
package; of an encoder or decoder "any" names the function of flexible sizes, and "x".join(shape) one of a fixed shape.
`compute_units` is what Core ML may use. `observe` maps further outputs to values of the program, and `turned` lists
those that are laid out as [B, K, 1, S] and handed out as [B, S, K].
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from runtimes.buckets import History
from runtimes.coreml_format import AGAIN, BrokenPackage
from runtimes.session import Array, CheckedSession, Limits, limits_of

if TYPE_CHECKING:
    from runtimes.bundle import Artifact, Bundle


class Engine(Protocol):
    """What runs a package's functions: `runtimes.coreml_device.Device` or `runtimes.coreml_interpreter.Interpreter`."""

    stand_in: str | None
    effective: dict[str, str]
    names: frozenset[str]

    def call(self, name: str, feeds: Mapping[str, Array]) -> dict[str, Array]: ...

    def reset(self) -> None: ...

    def close(self) -> None: ...


class CoreMlSession(CheckedSession):
    """One ``.mlpackage``. Use `open`; the arguments are those of CheckedSession and an engine."""

    def __init__(self, engine: Engine, artifact: Artifact, limits: Limits, *, timing: bool = False) -> None:
        super().__init__(artifact, limits, timing=timing)
        self._engine = engine
        self.stand_in, self.effective = engine.stand_in, dict(engine.effective)
        self._functions: Mapping[str, str] = artifact.options["functions"]
        self._observed = [spec for spec in artifact.outputs if spec.name in artifact.options.get("observe", {})]
        self._turned = frozenset(artifact.options.get("turned", ()))
        if self.capacity:
            self._history = History(self.capacity)
            self.lengths = tuple(sorted(map(int, self._functions)))
        # Caches that Core ML does not keep as states go in and come out.
        self._caches: dict[str, Array] = {}
        self._forget()

    @classmethod
    def open(cls, bundle: Bundle, artifact: Artifact, *, threads: int | None = None, timing: bool = False) -> Self:
        """Loads the package. `threads` is Core ML's own business.

        Raises BrokenPackage or WrongSpecification for files that this runtime cannot use.
        """
        package = bundle.file(artifact.model).parent
        where = f"{artifact.component} ({artifact.label})"
        functions = _functions(artifact, where)
        observed = artifact.options.get("observe", {})
        if sys.platform == "darwin" and not observed:
            from runtimes.coreml_device import Device

            engine: Engine = Device(package, artifact.options.get("compute_units", "ALL"), where)
        else:
            from runtimes.coreml_interpreter import Interpreter

            engine = Interpreter(package, observed)
        if absent := sorted(set(functions.values()) - engine.names):
            raise BrokenPackage(f"the package lacks the functions {', '.join(absent)} of the manifest", where, AGAIN)
        return cls(engine, artifact, limits_of(bundle, artifact), timing=timing)

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        return self._named(self._steps(feeds["ids"]) if self.capacity else self._whole(feeds))

    def _steps(self, ids: Array) -> dict[str, Array]:
        """Appends tokens in runs of the compiled lengths; the results are those of the last run."""
        results: dict[str, Array] = {}
        self.last_run_seconds = 0.0
        for chunk, last in self._history.runs(ids, self.position, self.lengths):
            feeds = {"ids": chunk, "last": np.array([last], np.int32)} | self._caches
            results = self._timed(self._functions[str(chunk.shape[1])], feeds)
            for state in self.artifact.states if self._caches else ():
                self._caches[state.input] = results[state.output]
        return results

    def _whole(self, feeds: dict[str, Array]) -> dict[str, Array]:
        self.last_run_seconds = 0.0
        shape = "x".join(str(size) for array in feeds.values() for size in array.shape)
        return self._timed(self._functions.get(shape, self._functions["any"]), feeds)

    def _timed(self, name: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        start = time.perf_counter()
        results = self._engine.call(name, feeds)
        self.last_run_seconds += time.perf_counter() - start
        return results

    def _named(self, results: dict[str, Array]) -> dict[str, Array]:
        """The artifact's outputs in its own dtypes, and observed values as the Program has them."""
        named = {
            spec.name: results[spec.name].astype(spec.dtype, copy=False)
            for spec in self.artifact.outputs
            if spec not in self._observed
        }
        for spec in self._observed:
            value = results[spec.name]
            value = value.squeeze(2).transpose(0, 2, 1) if spec.name in self._turned else value
            named[spec.name] = value[tuple(slice(n if isinstance(n, int) else None) for n in spec.shape)]
        return named

    def _forget(self) -> None:
        if not self.artifact.options.get("stateful", False):
            self._caches = {state.input: np.zeros(state.shape, state.dtype) for state in self.artifact.states}

    def _reset(self) -> None:
        self._engine.reset()
        self._forget()

    def _close(self) -> None:
        self._engine.close()
        self._caches = {}


def _functions(artifact: Artifact, where: str) -> Mapping[str, str]:
    """Compiled length or shape -> function, as the manifest has them. Raises BrokenPackage for what cannot be run."""
    held = artifact.options.get("functions")
    needed = "1" if artifact.states else "any"
    if not isinstance(held, Mapping) or not all(isinstance(name, str) for name in held.values()) or needed not in held:
        raise BrokenPackage(f"the manifest names no function for {needed!r}", where, AGAIN)
    if artifact.states and not all(key.isascii() and key.isdigit() for key in held):
        raise BrokenPackage(f"the manifest names functions by {', '.join(held)}, not by lengths", where, AGAIN)
    return held
