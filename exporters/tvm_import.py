"""Program to relax functions, by TVM's own importer with the lowerings of exporters/ops/tvm.py entered as its hooks.

Weights stay outside: every one becomes an input of the function, in the layout in which its kernel reads it, so that
integer weights stay integer (TVM would fold a constant's dequantisation) and all functions of a component share one
file of parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
import tvm
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec
from tvm import relax, tirx
from tvm.relax.frontend.torch import from_exported_program

from exporters.ops.tvm import Lowering
from exporters.program import Constant, Program, sources

#: kinds of placeholders that stand for weights
_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


@dataclass(frozen=True)
class Parameter:
    """A weight as an artifact holds it.

    Attributes:
        source: the constant of the Program that it is made of.
        load: reads the constant and brings it into this layout.
    """

    source: str
    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Imported:
    """A relax function whose parameters are the caller's inputs, the states, and then weights by name."""

    function: relax.Function
    parameters: Mapping[str, Parameter]


@dataclass
class Emitter:
    """What a lowering sees of the graph that is being built.

    Attributes:
        fast: kernels may round activations to int8.
        constants: node -> name of the constant that it stands for.
        origins: node -> the name that it has in the Program.
    """

    program: Program
    fast: bool
    constants: Mapping[str, str]
    origins: Mapping[str, str]
    values: Mapping[str, Constant]
    importer: Any = None
    added: dict[str, tuple[relax.Var, Parameter]] = field(default_factory=dict)
    _cache: dict[str, Any] = field(default_factory=dict)

    def is_constant(self, node: Any) -> bool:
        """Whether the node is one of the Program's constants."""
        return isinstance(node, fx.Node) and node.name in self.constants

    def value(self, argument: Any) -> Any:
        """The expression of a node; a null for None."""
        return relax.op.null_value() if argument is None else self.importer.env[argument]

    def weight(
        self, node: fx.Node | None, layout: str, dtype: str, shape: Sequence[int], pack: Callable[..., np.ndarray]
    ) -> Any:
        """The constant ``node`` repacked by ``pack`` as a parameter of the artifact; a null for None."""
        if node is None:
            return self.value(None)
        constant = self.constants[node.name]
        name = f"{constant}:{layout}"
        if name not in self.added:
            source = self.values[constant]
            if -1 in shape:
                shape = (int(np.prod(source.shape)),)
            packed = Parameter(constant, dtype, tuple(shape), lambda: pack(source.load()))
            self.added[name] = relax.Var(name, relax.TensorType(list(shape), dtype)), packed
        return self.added[name][0]

    def shape(self, value: Any) -> tuple[Any, ...]:
        """Sizes of an expression, symbolic ones included."""
        return tuple(value.ty.shape)

    def numbers(self, *values: int) -> Any:
        """Several integers as one argument."""
        return relax.ShapeExpr(list(values))

    def float32(self, node: fx.Node) -> Any:
        """The value of a node, cast to float32 where it is not that."""
        return self._cast(self.value(node), "float32")

    def integer(self, node: fx.Node) -> Any:
        """The value of a node as int32."""
        return self._cast(self.value(node), "int32")

    def like(self, value: Any, node: fx.Node) -> Any:
        """``value`` in the type of ``node``."""
        return self._cast(value, str(node.meta["val"].dtype).removeprefix("torch."))

    def _cast(self, value: Any, dtype: str) -> Any:
        if value.ty.dtype == dtype:
            return value
        return self.importer.block_builder.emit(relax.op.astype(value, dtype))

    def call(
        self, symbol: str, given: Sequence[Any], shapes: Sequence[Sequence[Any]], node: fx.Node, part: str = "",
        dtype: str = "float32",
    ) -> Any:  # fmt: skip
        """Calls a kernel with outputs of ``shapes``: one expression, or a list of them.

        Args:
            part: what the outputs are of the node's value, "" where the first of them is that value itself.
        """
        name = self.origins.get(node.name, node.name) + part
        fields = [_argument(value) for value in given] + [tvm.ir.StringImm(name)]
        kinds = [relax.TensorType(list(shape), dtype) for shape in shapes]
        called = relax.call_dps_packed(symbol, relax.Tuple(fields), kinds if len(kinds) > 1 else kinds[0])
        result = self.importer.block_builder.emit(called, name_hint=name.replace(" ", "_"))
        if len(kinds) == 1:
            return result
        return [self.importer.block_builder.emit(relax.TupleGetItem(result, i)) for i in range(len(kinds))]

    def once(self, node: fx.Node, make: Callable[[], Any]) -> Any:
        """What ``make`` emits for a node, made at most once."""
        if node.name not in self._cache:
            self._cache[node.name] = make()
        return self._cache[node.name]

    def together(self, *values: Any) -> Any:
        """Several results of one node."""
        return self.importer.block_builder.emit(relax.Tuple(list(values)))

    def row(self, value: Any, axis: int, index: int) -> Any:
        """The slice at ``index`` (0 or more) of an axis, which disappears."""
        if self.shape(value)[axis] == 1:
            return self.importer.block_builder.emit(relax.op.squeeze(value, [axis]))
        return self.importer.block_builder.emit(relax.op.take(value, relax.const(index, "int64"), axis, "clip"))

    def rows(self, table: Any, indices: Any) -> Any:
        """Rows of a table; an index beyond it reads its last one, where TVM's own form would read past the memory."""
        return self.importer.block_builder.emit(relax.op.take(table, indices, 0, "clip"))

    def extreme(self, node: fx.Node) -> Any:
        """aten.amax or aten.amin."""
        value, axes, keep = (*node.args, False)[:3]
        reduce = relax.op.max if node.target is torch.ops.aten.amax.default else relax.op.min
        return self.importer.block_builder.emit(reduce(self.value(value), list(axes), bool(keep)))

    def largest(self, value: Any, axis: int, keep: bool) -> Any:
        """The largest values along an axis, and where each first stands."""
        emit = self.importer.block_builder.emit
        return self.together(emit(relax.op.max(value, axis, keep)), emit(relax.op.argmax(value, axis, keep)))

    def distances(self, a: Any, b: Any) -> Any:
        """Euclidean, between the rows of matrices [..., N, K] and [..., M, K]: [..., N, M]."""
        emit, op = self.importer.block_builder.emit, relax.op
        turned = emit(op.permute_dims(b, [*range(len(self.shape(b)) - 2), -1, -2]))
        squares = [emit(op.sum(emit(op.multiply(value, value)), axis, True)) for value, axis in ((a, -1), (turned, -2))]
        product = emit(op.multiply(emit(op.matmul(a, turned)), relax.const(-2.0, a.ty.dtype)))
        total = emit(op.add(emit(op.add(product, squares[0])), squares[1]))
        return emit(op.sqrt(emit(op.maximum(total, relax.const(0.0, a.ty.dtype)))))

    def default(self, node: fx.Node) -> Any:
        """What TVM's own importer makes of the node."""
        return self.defaults[node.target.__name__](node)

    @property
    def defaults(self) -> Mapping[str, Any]:
        """TVM's own table of conversions, as it is before ours enter it."""
        if "defaults" not in self._cache:
            self._cache["defaults"] = self.importer.create_convert_map()
        return self._cache["defaults"]


def _argument(value: Any) -> Any:
    if isinstance(value, float):
        return relax.prim_value(tirx.FloatImm("float64", value))
    return relax.prim_value(value) if isinstance(value, int) else value


def import_program(
    program: Program, lowerings: Mapping[Any, Lowering], references: Mapping[Any, Callable], *, fast: bool = False
) -> Imported:
    """Converts a program; sizes that are symbolic in its inputs stay so.

    Args:
        lowerings: operator -> kernel call.
        references: operator -> decomposition, for the fused ops without a lowering.
        fast: see Emitter.
    """
    exported = _decomposed(program, lowerings, references)
    origins = _origins(program, exported)
    kinds = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    constants = {name: spec.target for name, spec in kinds.items() if spec.kind in _WEIGHTS}
    lifted = {name: Constant.of(np.array(tensor)) for name, tensor in exported.constants.items()
              if name not in program.constants}  # fmt: skip
    values = {**lifted, **program.constants}
    emitter = Emitter(program, fast, constants, origins, values)

    def hook(lowering: Lowering) -> Callable[[fx.Node, Any], Any]:
        def convert(node: fx.Node, importer: Any) -> Any:
            emitter.importer = importer
            return lowering(emitter, node)

        return convert

    table = {op.__name__: hook(lowering) for op, lowering in lowerings.items()}
    module = from_exported_program(
        _with_weights_as_inputs(exported), custom_convert_map=table, run_ep_decomposition=False
    )
    return _closed(module, emitter)


@cache
def _standard_decompositions() -> Mapping[Any, Callable]:
    """PyTorch's own table, which takes most of a second to make."""
    return dict(torch.export.default_decompositions().items())


def _decomposed(program: Program, lowerings: Mapping[Any, Any], references: Mapping[Any, Callable]) -> ExportedProgram:
    table = dict(_standard_decompositions())
    for op in lowerings:
        table.pop(op, None)
    # TVM resizes where PyTorch would spell out the index of every pixel.
    table.pop(torch.ops.aten.upsample_nearest2d.vec, None)
    table.update(references)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)  # raised inside torch by its own use of pytree
        return program.exported.run_decompositions(table)


def _origins(program: Program, exported: ExportedProgram) -> dict[str, str]:
    """Name of a node -> name in the Program as it was captured, one or two tracings ago."""
    last, before = sources(exported), sources(program.exported)
    return {name: before.get(source, source) for name, source in last.items()}


def _with_weights_as_inputs(exported: ExportedProgram) -> ExportedProgram:
    specs = [InputSpec(InputKind.USER_INPUT, spec.arg, None) for spec in exported.graph_signature.input_specs]
    signature = ExportGraphSignature(specs, exported.graph_signature.output_specs)
    return ExportedProgram(
        exported.graph_module,
        exported.graph_module.graph,
        signature,
        {},
        exported.range_constraints,
        exported.module_call_graph,
        verifiers=exported.verifiers,
    )


def _closed(module: tvm.IRModule, emitter: Emitter) -> Imported:
    """The function with its inputs first, then those weights that are read, all under their names in the artifact."""
    imported, program = module["main"], emitter.program
    names = iter([*(spec.name for spec in program.inputs), *(state.input for state in program.states)])
    renamed = {v: relax.Var(emitter.constants.get(v.name) or next(names), v.ty) for v in imported.params}
    inputs = [renamed[v] for v in imported.params if v.name not in emitter.constants]
    raw = [renamed[v] for v in imported.params if v.name in emitter.constants]
    weights = [*raw, *(variable for variable, _ in emitter.added.values())]
    bound = imported.bind_params(renamed)
    module.update_func(module.get_global_var("main"), _function(bound, [*inputs, *weights]))
    cleaned = relax.transform.DeadCodeElimination(["main"])(module)["main"]
    used = {variable.name for variable in relax.analysis.all_vars(cleaned.body)}
    kept = [variable for variable in cleaned.params[len(inputs) :] if variable.name in used]
    parameters = {v.name: _raw(v.name, emitter.values[v.name]) for v in raw}
    parameters |= {name: parameter for name, (_, parameter) in emitter.added.items()}
    function = _function(cleaned, [*cleaned.params[: len(inputs)], *kept])
    return Imported(function, {variable.name: parameters[variable.name] for variable in kept})


def _raw(name: str, constant: Constant) -> Parameter:
    return Parameter(name, constant.dtype, tuple(constant.shape), constant.load)


def _function(like: relax.Function, parameters: Sequence[relax.Var]) -> relax.Function:
    return relax.Function(list(parameters), like.body, like.ret_ty, like.is_pure, like.attrs)
