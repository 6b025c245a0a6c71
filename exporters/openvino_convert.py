"""Program to openvino.Model: OpenVINO's own reader of exported programs, with the fused ops as its extensions.

Why not through our ONNX files (OpenVINO 2026.4.1, the reference student in int4, one thread, exact mode, medians of an
interleaved run): the form of standard operators is not read at all (no rule for TensorScatter-24); the fused one is
read, but a cache that continues gives other logits (off by 19 of 19), its attention falls apart (12 Range, 23 Gather,
41 Eltwise, 25 Concatenation; no ScaledDotProductAttention), and a decode step takes 3.3 ms against 1.2 ms. Read from
the Program the compiled model has 17 FullyConnected on u4 and u8 codes, 9 RMS, 8 RoPE, 4 attention nodes that hold
the cache, 21 Eltwise, 24 Reshape, 8 Transpose, and differs from ONNX Runtime by 3e-5.

The graph is read without its weights (`read`), which tells what OpenVINO cannot take before anything is spent; then
`convert` puts the weights in, one at a time, and gives every value the name of the Program's node that it came from.
"""

from __future__ import annotations

import operator
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset15 as op
import torch
from openvino.frontend import FrontEndManager, OpConversionFailure
from openvino.frontend.pytorch import ConversionExtension
from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
from openvino.frontend.pytorch.torchdynamo.export_decompositions import ops_to_not_decompose
from openvino.op.util import Variable, VariableInfo
from torch.export import ExportedProgram
from torch.export.decomp_utils import CustomDecompTable

from exporters import ops
from exporters.encodings import ENCODINGS
from exporters.errors import ExportError
from exporters.openvino_weights import dequantised, looked_up
from exporters.ops.openvino import ATEN_LOWERINGS, LOWERINGS
from exporters.passes.graph import calls
from exporters.program import Program, sources

#: Name of the input that says which row of the cache each row continues; a session feeds 0, 1, ...
BEAM = "beam_idx"
#: operator in a graph -> how it is translated; the rest is the reader's.
TRANSLATED = {f"{ops.NAMESPACE}.{name}.default": lower for name, lower in LOWERINGS.items()} | {
    f"aten.{name}.default": lower for name, lower in ATEN_LOWERINGS.items()
}
#: Of the reader's report on what it could not translate.
_FAILED = re.compile(r"(?:No conversion rule found for operations|Conversion is failed for): (.*)")


class Unreadable(ExportError):
    """OpenVINO's reader has no rule for some operators.

    `nodes` holds one sentence per node of the Program that calls one of them.
    """

    def __init__(self, nodes: Sequence[str], where: str) -> None:
        self.nodes = tuple(nodes)
        way_out = (
            "Build the component for another backend (--backends), or add a lowering to exporters/ops/openvino.py."
        )
        super().__init__("; ".join(nodes), where=where, way_out=way_out)


class Reading:
    """One program while it is read: what its calls share, and what is still to be put in.

    Attributes:
        weights: placeholder of the graph -> name of the Program's constant.
        origins: node of the graph that is read -> node of the Program.
        values: the reader's name of a value -> the Program's nodes whose value it is.
        products: stand-in of a quantised matrix, and what makes it of a function that loads the Program's constants.
    """

    def __init__(self, program: Program, decomposed: ExportedProgram) -> None:
        signature = decomposed.graph_signature
        self.program, self.origins = program, sources(decomposed)
        self.values = _values(program, decomposed, self.origins)
        self.weights = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.weights |= signature.inputs_to_lifted_tensor_constants
        placeholders = [node.name for node in decomposed.graph.nodes if node.op == "placeholder"]
        given = [name for name in placeholders if name not in self.weights]
        self.inputs = dict(zip(given, program.inputs, strict=False))
        self.states = dict(zip(given[len(program.inputs) :], program.states, strict=True))
        self.products: list[tuple[ov.Output, Callable[[Callable[[str], np.ndarray]], ov.Output]]] = []
        self.pasts: list[Any] = []
        self.sinks: list[Any] = []
        self.shared: dict[str, ov.Output] = {}
        self._results: dict[tuple[str, int], Sequence[ov.Output]] = {}

    def translate(self, context: Any, lower: Callable[..., Sequence[ov.Output]]) -> list[ov.Output]:
        """The one value that the reader knows of a call; `result` finds the others behind it."""
        outputs = lower(ReadCall(context, self))
        self._results[_identity(outputs[0])] = outputs
        return [outputs[0]]

    def result(self, context: Any) -> list[ov.Output]:
        """A result of a call by its number."""
        return [self._results[_identity(context.get_input(0))][context.get_values_from_const_input(1)]]


class ReadCall:
    """Call protocol of exporters/ops/openvino.py over the reader's context of a node."""

    def __init__(self, context: Any, reading: Reading) -> None:
        self._context, self._reading = context, reading

    def tensor(self, index: int) -> ov.Output:
        """See Call."""
        return self._context.get_input(index)

    def value(self, index: int) -> Any:
        """See Call."""
        kind = self.tensor(index).get_node().get_type_name()
        # The reader's own node stands for None.
        constant = kind in ("Constant", "PtFrameworkNode")
        return self._context.get_values_from_const_input(index) if constant else self.tensor(index)

    def text(self, index: int) -> str:
        """See Call. The reader holds the text's bytes."""
        return np.array(self.tensor(index).get_node().data).tobytes().decode()

    def dequantised(self, index: int, bits: int) -> ov.Output:
        """See Call. A stand-in of the right shape, which `convert` replaces."""
        zeros = None if self.value(index + 2) is None else self._reading.weights[self._placeholder(index + 2)]
        return self._stand_in(index, bits, lambda load, *names: dequantised(load, *names, zeros, bits))

    def looked_up(self, index: int, encoding: str) -> ov.Output:
        """See Call."""
        bits = ENCODINGS[encoding].bits
        return self._stand_in(index, bits, lambda load, *names: looked_up(load, *names, encoding))

    def _stand_in(self, index: int, bits: int, make: Callable[..., ov.Output]) -> ov.Output:
        codes, scales = (self._reading.weights[self._placeholder(index + i)] for i in (0, 1))

        def stand_in() -> ov.Output:
            rows, blocks, width = self._reading.program.constants[codes].shape
            shape = np.array([rows, blocks * width * 8 // bits])
            value = op.broadcast(op.constant(np.float32(0)), op.constant(shape)).output(0)
            self._reading.products.append((value, lambda load: make(load, codes, scales)))
            return value

        return self.once(codes, stand_in)

    def state(self, index: int) -> tuple[ov.Output, Callable[[ov.Output], None]]:
        """See Call. It starts with no positions and grows by what is written."""
        spec = self._reading.states[self._placeholder(index)]
        batch, heads, _, width = spec.shape
        info = VariableInfo()
        info.data_shape = ov.PartialShape([batch, heads, -1, width])
        info.data_type = ov.Type(np.dtype(spec.dtype))
        info.variable_id = spec.name
        variable = Variable(info)
        past = ov.op.read_value(op.constant(np.zeros((batch, heads, 0, width), spec.dtype)), variable)
        past.set_friendly_name(spec.input)
        self._reading.pasts.append(past)
        return past.output(0), lambda new: self._reading.sinks.append(ov.op.assign(new.get_node(), variable))

    def once(self, key: str, make: Callable[[], ov.Output]) -> ov.Output:
        """See Call."""
        if key not in self._reading.shared:
            self._reading.shared[key] = make()
        return self._reading.shared[key]

    def _placeholder(self, index: int) -> str:
        return self.tensor(index).get_node().get_friendly_name()


def result(outputs: Any, index: int) -> None:
    """Stands for getitem on a fused op in the graph: the reader's own getitem would index the first result."""


def _identity(output: ov.Output) -> tuple[str, int]:
    return output.get_node().get_name(), output.get_index()


def _values(program: Program, decomposed: ExportedProgram, origins: Mapping[str, str]) -> dict[str, set[str]]:
    """Of several nodes that one of the Program's became, the last has its value; an op of several results has one name
    for the first, and each of its getitems one for its own."""
    last, values = {}, defaultdict(set)
    parts = {(node.args[0].name, node.args[1]): node.name for node in calls(program.exported.graph, operator.getitem)}
    for node in decomposed.graph.nodes:
        if node.op != "call_function" or node.name not in origins:
            continue
        if node.target is not operator.getitem:
            last[origins[node.name]] = node.name
        elif part := parts.get((origins[node.name], node.args[1])):
            values[f"{node.args[0].name if node.args[1] == 0 else node.name}:0"].add(part)
    for origin, name in last.items():
        values[f"{name}:0"].add(origin)
    return values


def read(program: Program) -> tuple[ov.Model, Reading]:
    """The graph without weights, and what is known of it.

    Raises:
        Unreadable: naming the nodes.
    """
    decomposed = _decompose(program)
    reading = Reading(program, decomposed)
    front_end = FrontEndManager().load_by_framework("pytorch")
    for name, lower in TRANSLATED.items():
        translate = lambda context, lower=lower: reading.translate(context, lower)  # noqa: E731
        front_end.add_extension(ConversionExtension(name, translate))
    front_end.add_extension(ConversionExtension(str(result), reading.result))
    for node in calls(decomposed.graph, operator.getitem):
        if str(node.args[0].target) in TRANSLATED:
            node.target = result
    decoder = TorchFXPythonDecoder(decomposed.graph_module, dynamic_shapes=False)
    try:
        return front_end.convert(front_end.load(decoder)), reading
    except OpConversionFailure as error:
        raise Unreadable(_culprits(decomposed, reading.origins, str(error)), f"{program.entry} for openvino") from error


@cache
def _decompositions() -> Mapping[Any, Callable]:
    """Operators that the reader does not know -> what they are made of. Half a second to collect."""
    table = CustomDecompTable()
    for kept in (*ops_to_not_decompose(), *(getattr(torch.ops.aten, name).default for name in ATEN_LOWERINGS)):
        table.pop(kept, None)
    for fused in ops.REGISTRY.values():
        if fused.name not in LOWERINGS:
            table[fused.overload] = fused.reference
    return table.materialize()


def _decompose(program: Program) -> ExportedProgram:
    """The program in operators that the reader knows, and those that are translated here."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)  # raised inside torch by its own use of pytree
        return program.exported.run_decompositions(dict(_decompositions()))


def _culprits(decomposed: ExportedProgram, origins: Mapping[str, str], report: str) -> list[str]:
    failed = {name.strip() for found in _FAILED.findall(report) for name in found.split(",")}
    nodes = [node for node in decomposed.graph.nodes if node.op == "call_function" and str(node.target) in failed]
    reasons = [
        f"node {origins.get(node.name, node.name)} calls {node.target}, which OpenVINO cannot read" for node in nodes
    ]
    return reasons or [f"OpenVINO cannot read the graph: {report.strip().splitlines()[-1]}"]


def convert(program: Program, progress: Callable[[int], None] = lambda size: None) -> ov.Model:
    """The program with its weights, its states as variables, and the Program's names on inputs, outputs and values.

    Args:
        progress: called with the bytes of each weight.

    Raises:
        Unreadable: naming the nodes that have no translation.
    """
    graph, reading = read(program)

    def load(name: str) -> np.ndarray:
        values = program.constants[name].load()
        progress(values.nbytes)
        return values

    parameters = {parameter.get_friendly_name(): parameter for parameter in graph.get_parameters()}
    for placeholder, name in reading.weights.items():
        if placeholder in parameters and parameters[placeholder].output(0).get_target_inputs():
            weight = op.constant(load(name))
            weight.set_friendly_name(name)
            parameters[placeholder].output(0).replace(weight.output(0))
    for stand_in, make in reading.products:
        stand_in.replace(make(load))
    inputs = [parameters[placeholder] for placeholder in reading.inputs]
    for parameter, spec in zip(inputs, program.inputs, strict=True):
        parameter.set_friendly_name(spec.name)
        parameter.output(0).set_names({spec.name})
    results = graph.get_results()[: len(program.outputs)]
    model = ov.Model(results, reading.sinks, inputs + _reordered(reading), program.entry)
    model.validate_nodes_and_infer_types()
    _name(model, reading)
    for node, spec in zip(model.get_results(), program.outputs, strict=True):
        node.set_friendly_name(f"{spec.name}/result")
        node.input_value(0).add_names({spec.name})
    return model


def _reordered(reading: Reading) -> list[Any]:
    """Puts a Gather by the input `beam_idx` behind each state: the plugin's stateful attention looks for one."""
    if not reading.pasts:
        return []
    beam = op.parameter([reading.pasts[0].get_output_partial_shape(0)[0].get_length()], np.int32, BEAM)
    beam.set_friendly_name(BEAM)
    beam.output(0).set_names({BEAM})
    for past in reading.pasts:
        readers = past.output(0).get_target_inputs()
        rows = op.gather(past, beam, op.constant(np.int32(0)))
        for reader in readers:
            reader.replace_source_output(rows.output(0))
    return [beam]


def _name(model: ov.Model, reading: Reading) -> None:
    """Replaces the reader's names by the Program's, and numbers that differ from run to run by the nodes' order."""
    taken: set[str] = set()
    for number, node in enumerate(model.get_ordered_ops()):
        if node.get_type_name() in ("Parameter", "Result"):
            continue
        for output in node.outputs():
            output.set_names({value_name(name) for held in output.get_names() for name in reading.values.get(held, ())})
        label = node.get_friendly_name()
        name, slash, rest = label.partition("/")  # the reader's: "<name in its graph>/<operator>/<type>"
        if slash and name in reading.origins:
            label = f"{reading.origins[name]}/{rest}"
        elif label == node.get_name():
            label = f"{node.get_type_name()}_{number}"
        label = label if label not in taken else f"{label}#{number}"
        taken.add(label)
        node.set_friendly_name(label)


def value_name(node: str) -> str:
    """Name in a model of the value of a node of the Program."""
    return f"{node}:0"
