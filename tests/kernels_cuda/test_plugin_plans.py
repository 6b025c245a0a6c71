"""What the plugins launch: the very launches and arguments with which the kernels' own tests call them, and the same
launches as expressions for TensorRT's ahead-of-time plugins."""

from __future__ import annotations

import functools
import itertools
import operator
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from runtimes.tensorrt_ops import bind, evaluate, kernel_name, load_ops
from tests.kernels_cuda import test_plugin_ops as nodes
from tests.kernels_cuda.plugin_library import TYPES, Library, Refused, Spec, build
from tools import bench_cuda_cases as cases
from tools import bench_cuda_cases_attention as attention_cases
from tools import bench_cuda_cases_decoder as decoder_cases
from tools.cuda_kernels import SOURCES, Plans, build_plans

OPS = load_ops(SOURCES / "library" / "ops.txt")
KINDS = {np.dtype(name): kind for name, kind in zip(("float32", "float16", "int8", "int32"), TYPES, strict=True)}
NODES = {"linear": "EdgeLinear", "linear_residual": "EdgeLinearResidual", "norm_linear": "EdgeNormLinear",
         "norm_linear_swiglu": "EdgeNormLinearSwiglu"}  # fmt: skip
SMS = 16


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Library:
    return Library(build(tmp_path_factory.mktemp("library")))


@pytest.fixture(scope="module")
def plans(tmp_path_factory) -> Plans:
    return Plans(build_plans(tmp_path_factory.mktemp("plans") / "plans.so"))


def key(launch: Any) -> tuple[Any, ...]:
    return launch.name, tuple(launch.grid), tuple(launch.block), launch.shared_bytes


# --- the kernels' own cases -------------------------------------------------------------------------------------------
def kernel_cases() -> list[tuple[str, dict[str, float], cases.Case]]:
    """(node, attributes but for the floats, case)."""
    found: list[tuple[str, dict[str, float], cases.Case]] = []
    for op, node in NODES.items():
        for sizes, bits, block, scale in [((1, 48, 96), 4, 32, np.float16), ((3, 64, 104), 8, 16, np.float32),
                                          ((70, 130, 160), 4, 160, np.float16)]:  # fmt: skip
            case = cases.linear(op, *sizes, bits=bits, block=block, scales=scale)
            found.append((node, {"bits": bits, "block": block}, case))
    found.append(("EdgeHead", {"bits": 4, "block": 32, "k": 5}, cases.head(2, 700, 96)))
    found.append(("EdgeMergeTop", {"k": 7}, cases.merge_top(2, 9, 7)))
    for steps, int8 in itertools.product((1, 5), (False, True)):
        case = attention_cases.attention(1, steps, 4, 2, 64, 40, [20], int8=int8, splits=3, window=9, softcap=2.0)
        attributes = {"heads": 4, "kv_heads": 2, "window": 9, "splits": 3}
        found.append((f"EdgeAttention{'Int8' * int8}", attributes, case))
    found.append(("EdgeAttentionMerge", {"heads": 4}, attention_cases.attention_merge(2, 3, 4, 64, 8)))
    found.append(("EdgeCodebook", {"size": 16}, decoder_cases.codebook(2, 3, 70, 40, 16)))
    for activation in ("silu", "snake"):
        case = decoder_cases.bias_activation(2, 6, 50, activation)
        found.append(("EdgeBiasActivation", {"activation": 1 + (activation == "snake")}, case))
    for workspace, size in ((False, 50), (True, 16384)):
        case = decoder_cases.group_norm(1, 32, size, 4, workspace=workspace)
        found.append(("EdgeGroupNormSilu", {"groups": 4, "silu": 1}, case))
    return found


@pytest.mark.parametrize(("name", "integers", "case"), kernel_cases(), ids=lambda value: getattr(value, "name", None))
def test_the_plugin_calls_the_kernel_as_its_tests_do(library, plans, name, integers, case) -> None:
    op = OPS[name]
    arrays = [value for value in case.arguments if not isinstance(value, (int, float))]
    numbers = case.arguments[len(arrays) :]
    workspace = case.plan[0] == "group_norm" and case.plan[1][-1] == 1
    taken = [tensor for tensor in op.tensor_arguments if tensor != op.workspace or workspace]
    by_name = dict(zip(taken, arrays, strict=True))
    floats = dict(zip(op.number_arguments, numbers, strict=True))
    attributes = {key: floats[key] if kind is float else integers[key] for key, kind in op.attributes.items()}

    inputs: list[Spec] = []
    for tensor in op.inputs:
        if tensor.name not in by_name:  # of which the node reads the shape alone
            inputs.append(("f16", (2, 3, 8)))
            continue
        array = by_name[tensor.name]
        shape = array.shape
        if len(shape) < len(tensor.shape):  # the kernels count rows, the nodes a batch and its tokens
            shape = (shape[0], 1, *shape[1:]) if name == "EdgeHead" else (1, *shape)
        inputs.append((KINDS[array.dtype], shape))

    wanted = plans(case.plan[0], *case.plan[1], SMS)
    found = library.plan(name, attributes, inputs, SMS, workspace)
    assert [key(launch) for launch in found] == [key(launch) for launch in wanted]
    assert len(found) == 1 + workspace
    names = [tensor.name for tensor in (*op.inputs, *op.outputs)] + [op.workspace]
    expected = [(names.index(tensor), 0) for tensor in taken]
    expected += [(-1, struct.unpack("i", struct.pack("f" if isinstance(n, float) else "i", n))[0]) for n in numbers]
    assert library.arguments(name, attributes, inputs, SMS, workspace) == expected
    size = by_name[op.workspace].nbytes if workspace else 4 * 256 if op.workspace else 0  # of the four groups
    assert library.workspace(name, attributes, inputs) == size


def test_shapes_that_no_kernel_takes_are_refused(library) -> None:
    name, attributes, inputs, _ = nodes.attention(1, 1, 4, 2, 36, 16, 1)  # a head of 36 is not a multiple of 8
    with pytest.raises(Refused, match=r"^EdgeAttention: no kernel takes B = 1, S = 1, heads = 4, "):
        library.plan(name, attributes, inputs, SMS)


# --- ahead of time ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Symbol:
    """An expression of one unknown, evaluated by calling it: what TensorRT's symbolic dimensions can say, no more."""

    at: Callable[[Mapping[str, int]], int]

    def _with(self, operation: Callable[[int, int], int], other: Symbol) -> Symbol:
        assert isinstance(other, Symbol)
        return Symbol(lambda values: int(operation(self.at(values), other.at(values))))

    __add__ = functools.partialmethod(_with, operator.add)
    __sub__ = functools.partialmethod(_with, operator.sub)
    __mul__ = functools.partialmethod(_with, operator.mul)
    __floordiv__ = functools.partialmethod(_with, operator.floordiv)
    __lt__ = functools.partialmethod(_with, operator.lt)
    __eq__ = functools.partialmethod(_with, operator.eq)  # type: ignore[assignment]


class Symbols:
    """tensorrt_ops.Algebra over Symbol."""

    def symbol(self, value: Any) -> Symbol:
        return value if isinstance(value, Symbol) else Symbol(lambda _: value)

    def ceil_div(self, a: Symbol, b: Symbol) -> Symbol:
        return a._with(lambda x, y: -(-x // y), b)

    def max(self, a: Symbol, b: Symbol) -> Symbol:
        return a._with(max, b)

    def min(self, a: Symbol, b: Symbol) -> Symbol:
        return a._with(min, b)


def linear_shapes():
    """Nodes of all formats, so that warps are split and not, x fits and does not, and the grid strides."""
    for name in NODES.values():
        for n, k, bits, block, scale in [
            (64, 96, 4, 32, "f16"), (48, 64, 4, 16, "f32"), (6144, 1024, 4, 128, "f16"), (130, 4096, 8, 64, "f32"),
            (256, 6144, 8, 6144, "f16"), (1024, 24608, 4, 32, "f16"), (16, 16384, 4, 128, "f16"),
            # One and two rows of x that fill 48 KiB to the byte but for the zeros behind them.
            (16, 24320, 4, 32, "f16"), (16, 12032, 4, 128, "f16"),
        ]:  # fmt: skip
            yield name, lambda b, s, args=(name, n, k, bits, block, scale): nodes.linear(args[0], b, s, *args[1:])


def shapes():
    yield from linear_shapes()
    for vocabulary, k, bits, block, top in [(1000, 64, 4, 32, 8), (257, 128, 8, 128, 64), (16684, 1024, 4, 128, 50)]:
        yield "EdgeHead", lambda b, s, args=(vocabulary, k, bits, block, top): nodes.head(b, *args)
    yield "EdgeMergeTop", lambda b, s: ("EdgeMergeTop", {"k": 5}, [("f32", (b, s, 5)), ("i32", (b, s, 5))], [])
    for heads, kv, d, c, splits in [(16, 8, 128, 512, 4), (14, 2, 64, 100, 1), (32, 1, 256, 64, 70), (4, 4, 24, 40, 2)]:
        for int8 in (False, True):
            args = (heads, kv, d, c, splits, int8)
            yield f"EdgeAttention{'Int8' * int8}", lambda b, s, args=args: nodes.attention(b, s, *args)
    yield "EdgeAttentionMerge", lambda b, s: nodes.merge(b, s, 4, 64, max(s, 8))
    for args in [(1, 1024, 8), (8, 256, 130)]:
        yield "EdgeCodebook", lambda b, s, args=args: nodes.codebook(b, *args, s, 3)
    for name, attributes in [
        ("EdgeGroupNormSilu", dict(groups=4, eps=1e-6, silu=1)),
        ("EdgeBiasActivation", dict(activation=2)),
    ]:
        for channels in (8, 52):
            yield (
                name,
                lambda b, s, args=(name, attributes, channels): nodes.decoder(args[0], args[1], b, args[2], s, 20),
            )


@pytest.mark.parametrize(
    ("name", "make"), [pytest.param(*case, id=f"{i}-{case[0]}") for i, case in enumerate(shapes())]
)
@pytest.mark.parametrize("sms", [8, 16, 132])
def test_ahead_of_time_launches_are_the_plans(library, plans, name, make, sms) -> None:
    """Batch and tokens are symbols, as in an engine for any length; the values of both are put in afterwards."""
    op, algebra = OPS[name], Symbols()
    assert op.launch is not None
    _, attributes, known, _ = make(1, 1)
    _, _, other, _ = make(2, 3)
    moving = [[(a, c) for a, c in zip(x[1], y[1], strict=True)] for x, y in zip(known, other, strict=True)]
    dims = [
        [a if a == c else Symbol(lambda values, i=i, d=d: values["inputs"][i][d]) for d, (a, c) in enumerate(pairs)]  # type: ignore[index]
        for i, pairs in enumerate(moving)
    ]
    types = [kind for kind, _ in known]
    scope = bind(op, attributes, dims, types, algebra) | {"sms": sms, "workspace": 0}
    sizes = [*op.launch.grid, *["1"] * (3 - len(op.launch.grid)), *op.launch.block, *["1"] * (3 - len(op.launch.block))]
    symbolic = [evaluate(text, scope, algebra) for text in (*sizes, op.launch.shared)]
    for b, s in [(1, 1), (2, 1), (4, 1), (5, 1), (1, 2), (1, 3), (1, 4), (1, 5), (1, 64), (1, 65), (3, 130), (1, 1024)]:
        _, _, inputs, _ = make(b, s)
        values = {"inputs": [shape for _, shape in inputs]}
        found = [value.at(values) if isinstance(value, Symbol) else value for value in symbolic]  # type: ignore[arg-type]
        fields = _fields(op, name, attributes, inputs, sms)
        (wanted,) = plans(*fields)
        assert kernel_name(op, scope, types, algebra) == wanted.name
        assert found == [*wanted.grid, *wanted.block, wanted.shared_bytes], (b, s)


def _fields(op, name, attributes, inputs, sms) -> list[Any]:
    """The plan's name and fields for the kernel of every shape (kind 1), read from the table's line."""
    lines = (SOURCES / "library" / "ops.txt").read_text().split(f"\n{name}\n")[1].splitlines()
    plan, _, fields = next(line for line in lines if line.startswith("plan "))[5:].partition(":")
    scope = bind(op, attributes, [shape for _, shape in inputs], [kind for kind, _ in inputs], Symbols())
    scope |= {"sms": sms, "workspace": 0}
    values = [evaluate(text.strip(), scope, Symbols()) for text in fields.split(",")]
    if plan in ("linear", "attention"):
        values[-2] = 1
    return [plan, *values]


def test_what_symbols_can_say_is_enough_for_remainders() -> None:
    algebra = Symbols()
    x = Symbol(lambda values: values["x"])
    for text, oracle in [
        ("x % 5", lambda x: x % 5),
        ("x <= 7", lambda x: x <= 7),
        ("max(x, 4) + min(x, 3) * 2", lambda x: max(x, 4) + min(x, 3) * 2),
        ("ceil_div(x, 3) - (x == 4)", lambda x: -(-x // 3) - (x == 4)),
        ("40 // (x + 1)", lambda x: 40 // (x + 1)),
    ]:
        value = evaluate(text, {"x": x}, algebra)
        assert [value.at({"x": i}) for i in range(12)] == [int(oracle(i)) for i in range(12)]
        assert [evaluate(text, {"x": i}, algebra) for i in range(12)] == [int(oracle(i)) for i in range(12)]
