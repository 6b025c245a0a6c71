"""The table of our custom nodes, kernels/cuda/library/ops.txt, for Python: the file says what its lines mean.

The C++ libraries read the same file; there the expressions are evaluated over numbers and TensorRT's C++ expressions,
here over ints and whatever symbols an `Algebra` brings.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from runtimes.errors import MAKE_AGAIN, Fault


class BrokenTable(Fault):
    """The table of ops is not one that this program reads."""


class Algebra(Protocol):
    """Symbols: they have + - * // == <, and ints become symbols where they meet one."""

    def symbol(self, value: Any) -> Any:
        """``value``, an int or a symbol, as a symbol."""

    def ceil_div(self, a: Any, b: Any) -> Any: ...

    def max(self, a: Any, b: Any) -> Any: ...

    def min(self, a: Any, b: Any) -> Any: ...


@dataclass(frozen=True)
class Tensor:
    """An input or output: its types, its dimensions as expressions (then any where ``open``), and for an output that is
    `like` an input that input's name."""

    name: str
    types: tuple[str, ...]
    shape: tuple[str, ...]
    open: bool
    like: str | None = None


@dataclass(frozen=True)
class Launch:
    """A launch as expressions; ``kernel`` with expressions in braces."""

    kernel: str
    grid: tuple[str, ...]
    block: tuple[str, ...]
    shared: str


@dataclass(frozen=True)
class Op:
    """One custom node; see ops.txt. ``workspace`` is the name of a scratch buffer that launches in twos have."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    attributes: Mapping[str, type]
    tensor_arguments: tuple[str, ...]
    number_arguments: tuple[str, ...]
    launch: Launch | None
    workspace: str | None = None


def load_ops(path: Path) -> dict[str, Op]:
    """The table by name. Raises BrokenTable."""
    paragraphs: dict[str, dict[str, str]] = {}
    macros: dict[str, str] = {}
    current: dict[str, str] | None = None
    try:
        for line in path.read_text("utf-8").splitlines():
            if not line or line.startswith(("#", 'R"ops(', ')ops"')):
                continue
            key, _, text = line.partition(" ")
            if key == "let":
                name, _, macros_text = text.partition("=")
                macros[name.strip()] = macros_text.strip()
            elif not text:
                current = paragraphs.setdefault(key, {})
            else:
                assert current is not None
                current[key] = _substituted(text, macros)
        return {name: _op(name, lines) for name, lines in paragraphs.items()}
    except (OSError, UnicodeDecodeError) as error:
        raise BrokenTable(f"cannot be read ({error})", str(path), MAKE_AGAIN) from error
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        raise BrokenTable(f"is not a table of ops ({error!r})", str(path), MAKE_AGAIN) from error


def _substituted(text: str, macros: Mapping[str, str]) -> str:
    while "$" in text:
        text = re.sub(r"\$(\w+)", lambda match: macros[match[1]], text)
    return text


def _split(text: str, separator: str = ";") -> list[str]:
    """Parts between separators outside of round brackets, trimmed."""
    parts, depth = [""], 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if char == separator and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def _op(name: str, lines: Mapping[str, str]) -> Op:
    inputs: dict[str, Tensor] = {}
    for part in _split(lines["in"]):
        tensor = _tensor(part)
        inputs[tensor.name] = tensor
    outputs = []
    for part in _split(lines["out"]):
        words = part.split()
        like = inputs[words[2]] if words[1] == "like" else None
        outputs.append(Tensor(words[0], like.types, like.shape, like.open, like.name) if like else _tensor(part))
    kinds = dict(part.split() for part in _split(lines.get("attr", "")))
    tensors, _, numbers = lines.get("args", ";").partition(";")
    return Op(
        name,
        tuple(inputs.values()),
        tuple(outputs),
        {attribute: {"int": int, "float": float}[kind] for attribute, kind in kinds.items()},
        tuple(_split(tensors, ",")),
        tuple(_split(numbers, ",")),
        _launch(lines["aot"]) if "aot" in lines else None,
        lines["work"].partition(":")[0] if "work" in lines else None,
    )


def _tensor(text: str) -> Tensor:
    name, types, shape = text.split(" ", 2)
    dims = _split(shape.strip()[1:-1], ",")
    return Tensor(name, tuple(types.split("|")), tuple(dim for dim in dims if dim != "..."), "..." in dims)


def _launch(text: str) -> Launch:
    kernel, grid, block, shared = _split(text)
    return Launch(kernel, tuple(_split(grid, ",")), tuple(_split(block, ",")), shared)


# --- expressions ----------------------------------------------------------------------------------------------------
def bind(
    op: Op, attributes: Mapping[str, int | float], dims: Sequence[Sequence[Any]], types: Sequence[str], algebra: Algebra
) -> dict[str, Any]:
    """What names stand for: integer attributes, the dimensions of the inputs, `rest`, `x.f32`. Types are "f16" and so
    on; the caller adds `sms` where a launch is wanted. The graph was checked by TensorRT: only ranks are looked at."""
    scope: dict[str, Any] = {name: int(value) for name, value in attributes.items() if op.attributes[name] is int}
    for tensor, shape, kind in zip(op.inputs, dims, types, strict=True):
        if len(shape) < len(tensor.shape) or (len(shape) > len(tensor.shape) and not tensor.open):
            wanted = ", ".join([*tensor.shape, *(["..."] if tensor.open else [])])
            raise Fault(f"has {len(shape)} dimensions, must have [{wanted}]", f"{op.name}, {tensor.name}", MAKE_AGAIN)
        scope[f"{tensor.name}.f32"] = int(kind == "f32")
        for text, value in zip(tensor.shape, shape, strict=False):
            if text.isidentifier():
                scope.setdefault(text, value)
        if tensor.open:
            scope["..."] = list(shape[len(tensor.shape) :])
            scope["rest"] = 1
            for value in scope["..."]:
                scope["rest"] = _apply(ast.Mult, scope["rest"], value, algebra)
    return scope


def output_shape(tensor: Tensor, scope: Mapping[str, Any], algebra: Algebra) -> list[Any]:
    """An output's dimensions."""
    dims = [evaluate(text, scope, algebra) for text in tensor.shape]
    return dims + scope["..."] if tensor.open else dims


def kernel_name(op: Op, scope: Mapping[str, Any], types: Sequence[str], algebra: Algebra) -> str:
    """The launch's kernel; what stands in its braces must be known numbers."""
    assert op.launch is not None
    kinds = dict(zip((tensor.name for tensor in op.inputs), types, strict=True))

    def value(match: re.Match[str]) -> str:
        return kinds.get(match[1]) or str(evaluate(match[1], scope, algebra))

    return re.sub(r"\{(.*?)\}", value, op.launch.kernel)


def evaluate(text: str, scope: Mapping[str, Any], algebra: Algebra) -> Any:
    """An expression's value: an int where all names stand for ints. The grammar is expression.h's."""
    return _value(ast.parse(text.replace(".", "__"), mode="eval").body, scope, algebra)


def _value(node: ast.expr, scope: Mapping[str, Any], algebra: Algebra) -> Any:
    match node:
        case ast.Constant(value=int()):
            return node.value
        case ast.Name():
            return scope[node.id.replace("__", ".")]
        case ast.BinOp():
            return _apply(type(node.op), _value(node.left, scope, algebra), _value(node.right, scope, algebra), algebra)
        case ast.Compare(ops=[op], comparators=[right]):
            return _apply(type(op), _value(node.left, scope, algebra), _value(right, scope, algebra), algebra)
        case ast.Call(func=ast.Name(id="one_of")):
            subject, *others = (_value(argument, scope, algebra) for argument in node.args)
            return int(subject in others)
        case ast.Call(func=ast.Name(id=name)):
            a, b = (_value(argument, scope, algebra) for argument in node.args)
            if isinstance(a, int) and isinstance(b, int):
                return -(-a // b) if name == "ceil_div" else {"max": max, "min": min}[name](a, b)
            return getattr(algebra, name)(algebra.symbol(a), algebra.symbol(b))
    raise BrokenTable(f"cannot be evaluated: {ast.unparse(node)}", "ops.txt", MAKE_AGAIN)


def _apply(operation: type, a: Any, b: Any, algebra: Algebra) -> Any:
    if operation is ast.Mod:
        return _apply(ast.Sub, a, _apply(ast.Mult, _apply(ast.FloorDiv, a, b, algebra), b, algebra), algebra)
    if operation is ast.LtE:
        return _apply(ast.Lt, a, _apply(ast.Add, b, 1, algebra), algebra)
    if not (isinstance(a, int) and isinstance(b, int)):
        a, b = algebra.symbol(a), algebra.symbol(b)
    results: dict[type, Callable[[], Any]] = {
        ast.Add: lambda: a + b,
        ast.Sub: lambda: a - b,
        ast.Mult: lambda: a * b,
        ast.FloorDiv: lambda: a // b,
        ast.Eq: lambda: a == b,
        ast.Lt: lambda: a < b,
    }
    result = results[operation]()
    return int(result) if isinstance(result, bool) else result
