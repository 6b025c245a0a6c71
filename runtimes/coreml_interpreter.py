"""Runs a saved Core ML program in numpy: the stand-in where Core ML is not.

Every result is rounded to the type that the program declares for it. A float32 program shows that the conversion is
right; a float16 one shows what rounding after every operator costs, and the first finite value that becomes infinite
is named. Neither is Apple's arithmetic: what passes here is a proxy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.coreml_format import Name, Operation, Program, load_package, stored
from runtimes.coreml_ops import OPS
from runtimes.errors import Fault

Array = np.ndarray[Any, Any]

#: What the interpreter does itself: they touch states or are constants.
_OWN = ("const", "read_state", "write_state")


class UnknownOperator(Fault):
    """The program holds an operator that the interpreter does not know."""


class Float16Overflow(Fault):
    """A finite value became infinite when it was rounded to float16."""


class OperatorFailed(Fault):
    """An operator could not be computed on what the program hands it."""


@dataclass(frozen=True)
class Step:
    """One operation, ready to run: its constant arguments, and the names of the others."""

    operation: Operation
    compute: Callable[..., Any]
    constants: Mapping[str, Any]
    names: tuple[tuple[str, Any], ...]


class Function:
    """One function of a program; float values are held as float32, those of float16 rounded.

    Args:
        shared: decoded compressed constants, by their arguments; the functions of one package share them.
        strict: raise Float16Overflow where it happens, rather than going on with infinities.
    """

    def __init__(self, program: Program, shared: dict[Any, Any], *, strict: bool = True) -> None:
        self.name, self.inputs, self.outputs, self.states = (
            program.name, program.inputs, program.outputs, program.states
        )  # fmt: skip
        self._strict, self._shared = strict, shared
        self._constants: dict[str, Any] = {}
        self._steps: list[Step] = []
        self.half = any(dtype == "float16" for operation in program.operations for _, dtype in operation.outputs)
        for operation in program.operations:
            self._add(operation)

    def _add(self, operation: Operation) -> None:
        if operation.type == "const":
            self._constants[operation.outputs[0][0]] = _widened(operation.constant)
            return
        if operation.type not in OPS and operation.type not in _OWN:
            raise UnknownOperator(
                f"operator {operation.type!r} ({operation.outputs[0][0]}) is not known to the interpreter",
                f"function {self.name}",
                "Run the package where Core ML is.",
            )
        constants, names = {}, []
        for key, value in operation.arguments.items():
            if _is_constant(value, self._constants):
                constants[key] = _resolved(value, self._constants)
            else:
                names.append((key, value))
        step = Step(operation, OPS.get(operation.type, _nothing), constants, tuple(names))
        if operation.type.startswith("constexpr_"):
            # The arguments stay alive with their result: an id is only theirs while they are.
            held = (operation.type, *(id(value) for value in constants.values()), operation.outputs[0][1])
            if held not in self._shared:
                self._shared[held] = self._call(step, {})[0], constants
            self._constants[operation.outputs[0][0]] = self._shared[held][0]
        else:
            self._steps.append(step)

    def run(
        self, feeds: Mapping[str, Array], states: dict[str, Array], wanted: Iterable[str] | None = None
    ) -> dict[str, Array]:
        """The values of ``wanted``, by default the function's outputs; ``states`` is updated.

        Raises:
            Float16Overflow: naming the operator, if the function is strict.
            OperatorFailed: naming the operator.
        """
        values: dict[str, Any] = {name: _widened(array) for name, array in feeds.items()}
        names = self.outputs if wanted is None else tuple(wanted)
        kept = set(names)
        results: dict[str, Array] = {}
        # Results that overflow or are undefined are looked for where they are rounded.
        with np.errstate(all="ignore"):
            for step in self._steps:
                operation = step.operation
                if operation.type == "read_state":
                    value = states[operation.arguments["input"].name]
                    values[operation.outputs[0][0]] = value
                    continue
                if operation.type == "write_state":
                    data = operation.arguments["data"]
                    states[operation.arguments["input"].name] = values[data.name]
                    continue
                for (name, _), value in zip(operation.outputs, self._call(step, values), strict=True):
                    values[name] = value
        for name in kept:
            results[name] = values[name] if name in values else self._constants[name]
        return results

    def _call(self, step: Step, values: Mapping[str, Any]) -> list[Any]:
        operation = step.operation
        arguments = dict(step.constants)
        for key, reference in step.names:
            if isinstance(reference, list):
                arguments[key] = [_one(item, values, self._constants) for item in reference]
            else:
                arguments[key] = values[reference.name]
        try:
            results = step.compute(**arguments)
        except (ValueError, TypeError, IndexError, KeyError) as error:
            raise OperatorFailed(
                f"{operation.type}: {error}",
                f"function {self.name}, {operation.outputs[0][0]}",
                "Build the bundle again.",
            ) from error
        parts = results if isinstance(results, list) else [results]
        return [
            self._rounded(part, dtype, operation) for part, (_, dtype) in zip(parts, operation.outputs, strict=True)
        ]

    def _rounded(self, value: Any, dtype: str, operation: Operation) -> Any:
        if dtype == "float16":
            rounded = value.astype(np.float16).astype(np.float32)
            if self._strict and not np.isfinite(rounded).all() and np.isfinite(value).all():
                raise Float16Overflow(
                    f"{operation.type} overflows float16: its largest value is {np.abs(value).max():.3g}",
                    f"function {self.name}, {operation.outputs[0][0]}",
                    "Use the exact mode, or keep this operator in float32.",
                )
            return rounded
        return value if value.dtype == dtype or dtype == "list" else value.astype(dtype)


def _nothing(**arguments: Any) -> None:
    """Stands where the interpreter itself acts."""


def _widened(value: Any) -> Any:
    return value.astype(np.float32) if isinstance(value, np.ndarray) and value.dtype == np.float16 else value


def _is_constant(value: Any, constants: Mapping[str, Any]) -> bool:
    if isinstance(value, list):
        return all(_is_constant(item, constants) for item in value)
    return not isinstance(value, Name) or value.name in constants


def _resolved(value: Any, constants: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_resolved(item, constants) for item in value]
    return constants[value.name] if isinstance(value, Name) else _widened(value)


def _one(item: Any, values: Mapping[str, Any], constants: Mapping[str, Any]) -> Any:
    if not isinstance(item, Name):
        return _widened(item)
    return values[item.name] if item.name in values else constants[item.name]


class Interpreter:
    """A saved package as an engine of `runtimes.coreml_`: every function over the same states.

    Args:
        observed: name of a further output -> name of the value of the program that it holds.
    """

    def __init__(self, package: Path, observed: Mapping[str, str]) -> None:
        shared: dict[Any, Any] = {}
        # A value that is looked at must be seen, infinite or not.
        programs = load_package(package)
        self._functions = {name: Function(program, shared, strict=not observed) for name, program in programs.items()}
        self.names = frozenset(programs)
        self._observed = observed
        self._states: dict[str, Array] = {}
        half = any(function.half for function in self._functions.values())
        precision = "float32, rounded to float16 after every operator that says so" if half else "float32"
        self.stand_in: str | None = f"an interpreter of the saved package ({precision})"
        self.effective = {"precision": precision, **stored(programs.values())}
        self.reset()

    def call(self, name: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """One run of a function: its outputs and what is observed."""
        function = self._functions[name]
        results = function.run(feeds, self._states, (*function.outputs, *self._observed.values()))
        return results | {output: results[value] for output, value in self._observed.items()}

    def reset(self) -> None:
        """Every state as zeros, as Core ML makes them."""
        for function in self._functions.values():
            for name, (_, shape) in function.states.items():
                self._states[name] = np.zeros(shape, np.float32)

    def close(self) -> None:
        """Lets go of the weights."""
        self._functions, self._states = {}, {}
