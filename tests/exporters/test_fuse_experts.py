"""Experts in ONNX Runtime's own operator: against a formula in float64, and dense where it would not be exact."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from exporters import ops
from exporters.blocks import BlockLayout
from exporters.external_data import WeightFile
from exporters.families.experts import DenseExperts
from exporters.families.modules import QuantizedWeight
from exporters.onnx_ import FORMS, Form, for_runtime, lower
from exporters.onnx_weights import read_matrices
from exporters.passes.fuse_experts import MATRICES, unread
from exporters.program import Program, capture
from runtimes.bundle import TensorSpec
from tests.exporters.op_cases import Array, dequantised
from tools.bench_moe import random_linear

EXACT, FAST, STANDARD = (FORMS[key] for key in (("fused", "exact"), ("fused", "fast"), ("standard", "exact")))
#: Of the largest value; float32 sums of some hundred terms.
LIMIT = 3e-6
EXPERTS, CHOSEN, HIDDEN, WIDTH = 4, 2, 96, 64
LAYOUT = BlockLayout(4, 32, True)


def normalised(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As Mixtral's, and Qwen3-MoE's with norm_topk_prob."""
    weights, choice = torch.softmax(logits, -1).topk(CHOSEN)
    return weights / weights.sum(-1, keepdim=True), choice


def as_they_are(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As Qwen2-MoE's: the weights of a row do not sum to one."""
    return torch.softmax(logits, -1).topk(CHOSEN)


def biased(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As DeepSeek's and GLM's: chosen by other numbers than they are weighted by, and scaled."""
    scores = torch.sigmoid(logits)
    choice = (scores + torch.linspace(1, 0, EXPERTS)).topk(CHOSEN)[1]
    weights = scores.gather(1, choice)
    return 2.5 * weights / (weights.sum(-1, keepdim=True) + 1e-20), choice


def all_of_them(logits: Tensor) -> tuple[Tensor, Tensor]:
    """k is E."""
    return torch.softmax(logits, -1).topk(EXPERTS)


def signed(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights that may be negative."""
    return logits.topk(CHOSEN)


def gelu_gate(joined: Tensor) -> Tensor:
    gate, up = joined.chunk(2, -1)
    return torch.nn.functional.gelu(gate) * up


@dataclass(frozen=True)
class Case:
    """One layer: its router, the layouts of both matrices, I, the gate; and the forms whose operator takes it."""

    router: Callable[[Tensor], tuple[Tensor, Tensor]] = normalised
    inner: BlockLayout = LAYOUT
    outer: BlockLayout | None = None
    width: int = WIDTH
    gate: Callable[[Tensor], Tensor] = ops.swiglu
    fused: tuple[str, ...] = ("exact", "fast")


CASES: Mapping[str, Case] = {
    "zeros": Case(),
    "symmetric": Case(inner=BlockLayout(4, 16, False)),
    "as they are": Case(as_they_are),
    "biased": Case(biased),
    "all of them": Case(all_of_them),
    # The kernels of other widths round their input, which only the fast form may do, or look pairs of codes up.
    "8 bits": Case(inner=BlockLayout(8, 32, True), fused=("fast",)),
    "2 bits": Case(inner=BlockLayout(2, 32, True), fused=()),
    "negative weights": Case(signed, fused=()),
    "another gate": Case(gate=gelu_gate, fused=()),
    "blocks that reach past the columns": Case(width=80, fused=()),
    "one block, whose zero points lie otherwise": Case(width=32, fused=()),
    "one block without them": Case(inner=BlockLayout(4, 32, False), width=32),
    "zero points in one of the two": Case(outer=BlockLayout(4, 32, False), fused=()),
    "blocks of two sizes": Case(outer=BlockLayout(4, 16, True), fused=()),
}


class Layer(nn.Module):
    """``forward(rows [T, H], logits [T, E]) -> [T, H]``."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.router = case.router
        down = [random_linear(HIDDEN, case.width, case.outer or case.inner) for _ in range(EXPERTS)]
        inner = random_linear(2 * case.width * EXPERTS, HIDDEN, case.inner)
        self.experts = DenseExperts([inner], down, EXPERTS, case.gate, paired=True)

    def forward(self, rows: Tensor, logits: Tensor) -> Tensor:
        weights, choice = self.router(logits)
        return self.experts(rows, choice, weights)

    def matrices(self) -> list[QuantizedWeight]:
        """The one of all gates and ups, and each expert's other one."""
        return [self.experts.inner[0].matrix, *(each.matrix for each in self.experts.outer)]


class Layers(nn.Module):
    """Cases side by side: what takes long is to trace, however much it is."""

    def __init__(self, cases: Iterable[Case]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.each = nn.ModuleList(map(Layer, cases))

    def forward(self, rows: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(rows, logits) for layer in self.each)


@dataclass(frozen=True)
class Made:
    """The layers in one form."""

    layers: Layers
    model: ir.Model
    path: Path
    session: onnxruntime.InferenceSession

    def fused(self) -> set[str]:
        """The cases that the operator is in, once each."""
        names = [node.metadata_props[MATRICES].split(".")[1] for node in self.model.graph if node.op_type == "QMoE"]
        assert len(names) == len(set(names))
        return {list(CASES)[int(name)] for name in names}

    def run(self, case: str, rows: Array, logits: Array) -> Array:
        return self.session.run([f"y{list(CASES).index(case)}"], {"rows": rows, "logits": logits})[0]


RECIPES: Mapping[str, Form] = {"exact": EXACT, "fast": FAST, "dense": for_runtime(EXACT, "1.30.2")}


def captured(*cases: Case) -> tuple[Layers, Program]:
    module = Layers(cases).eval()
    spec = tuple(TensorSpec(f"y{index}", "float32", ("T", HIDDEN)) for index in range(len(cases)))
    examples, dynamic = (torch.randn(3, HIDDEN), torch.randn(3, EXPERTS)), {"rows": {0: "T"}, "logits": {0: "T"}}
    return module, capture("lm", module, examples, dynamic, spec, ("rows", "logits"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """All layers in a form of RECIPES, made once."""
    (module, program), translated = captured(*CASES.values()), {}

    @cache
    def make(form: str) -> Made:
        folder = tmp_path_factory.mktemp(form)
        model = lower(program, RECIPES[form], translated)
        with WeightFile(folder / "layer.data") as weights:
            weights.adopt(model)
        ir.save(model, folder / "layer.onnx")
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        session = onnxruntime.InferenceSession(folder / "layer.onnx", options, providers=["CPUExecutionProvider"])
        return Made(module, model, folder / "layer.onnx", session)

    return make


def weights_of(matrix: QuantizedWeight) -> Array:
    zeros = None if matrix.zeros is None else matrix.zeros.numpy()
    return dequantised(matrix.codes.numpy(), matrix.scales.numpy(), zeros, matrix.bits, matrix.columns)


def formula(layer: Layer, rows: Array, logits: Array) -> Array:
    """Expert by expert in float64, from the codes; the router's choice is PyTorch's."""
    weights, choice = (values.numpy() for values in layer.router(torch.from_numpy(logits)))
    inner, *outer = map(weights_of, layer.matrices())
    inner, result = inner.reshape(EXPERTS, -1, HIDDEN), np.zeros((len(rows), HIDDEN))
    for row, experts, shares in zip(range(len(rows)), choice, weights, strict=True):
        for expert, share in zip(experts, shares, strict=True):
            gate, up = torch.from_numpy((inner[expert] @ rows[row].astype(float)).reshape(-1, 2).T)
            gated = layer.experts.gate.reference if layer.experts.gate is ops.swiglu else layer.experts.gate
            result[row] += share.astype(float) * (outer[expert] @ gated(torch.cat((gate, up))).numpy())
    return result


def feeds(count: int) -> tuple[Array, Array]:
    random = np.random.default_rng(count)
    rows, logits = (random.standard_normal((count, size)).astype(np.float32) for size in (HIDDEN, EXPERTS))
    return rows, logits


def far(got: Array, wanted: Array) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("form", ["exact", "fast"])
def test_the_operator_takes_what_it_computes_exactly(form: str, made: Callable[[str], Made]) -> None:
    assert made(form).fused() == {name for name, case in CASES.items() if form in case.fused}


@pytest.mark.parametrize("name", CASES)
def test_every_case_computes_the_chosen_experts(name: str, made: Callable[[str], Made]) -> None:
    """In the operator or densely."""
    layer = made("exact").layers.each[list(CASES).index(name)]
    for count in (1, 7, 70):
        rows, logits = feeds(count)
        assert far(made("exact").run(name, rows, logits), formula(layer, rows, logits)) <= LIMIT


@pytest.mark.parametrize("name", ["zeros", "as they are"])
def test_ties_and_vanishing_weights_are_those_of_the_dense_form(name: str, made: Callable[[str], Made]) -> None:
    rows, logits = feeds(5)
    logits[1] = 0.0  # every expert as good as any other
    logits[2, 1:] = logits[2, 1]  # all but one
    logits[3], logits[3, 3] = -80.0, 80.0  # the second one's weight is nothing
    logits[4, 2] += 15.0  # and here next to nothing
    assert not made("dense").fused()
    assert far(made("exact").run(name, rows, logits), made("dense").run(name, rows, logits)) <= LIMIT


@pytest.mark.parametrize("name", ["zeros", "8 bits"])
def test_the_fast_form_rounds_the_rows_to_eight_bits(name: str, made: Callable[[str], Made]) -> None:
    rows, logits = feeds(4)
    wanted = formula(made("fast").layers.each[list(CASES).index(name)], rows, logits)
    assert LIMIT < far(made("fast").run(name, rows, logits), wanted) <= 0.03


@pytest.mark.parametrize("form", ["exact", "fast", "dense"])
def test_every_matrix_is_read_back(form: str, made: Callable[[str], Made]) -> None:
    found, expected = read_matrices(made(form).path), {}
    for index, layer in enumerate(made(form).layers.each):
        names = ["inner.0", *(f"outer.{number}" for number in range(EXPERTS))]
        expected |= {f"each.{index}.experts.{name}.matrix": m for name, m in zip(names, layer.matrices(), strict=True)}
    assert found.keys() == expected.keys()
    for name, matrix in expected.items():
        stored = found[name]
        np.testing.assert_array_equal(stored.weights()[:, : matrix.columns], weights_of(matrix).astype(np.float32))
        assert stored.scales.tobytes() == matrix.scales.numpy().tobytes()


@pytest.mark.parametrize("expert", [None, 0, EXPERTS - 1])
def test_one_changed_bit_is_found_in_its_own_matrix(
    expert: int | None, made: Callable[[str], Made], tmp_path: Path
) -> None:
    part = "inner.0" if expert is None else f"outer.{expert}"
    initializers = made("exact").model.graph.initializers
    held = initializers[f"each.0.experts.{part[:-1]}0.matrix.codes.experts"].const_value
    raw = bytearray(made("exact").path.with_name("layer.data").read_bytes())
    raw[held.offset + (expert or 0) * held.nbytes // EXPERTS] ^= 0x10
    (tmp_path / "layer.data").write_bytes(raw)
    (tmp_path / "layer.onnx").write_bytes(made("exact").path.read_bytes())
    before, after = read_matrices(made("exact").path), read_matrices(tmp_path / "layer.onnx")
    changed = {name for name in after if not np.array_equal(before[name].codes, after[name].codes)}
    assert changed == {f"each.0.experts.{part}.matrix"}


def test_the_codes_are_written_once_for_both_fused_forms(tmp_path: Path) -> None:
    (module, program), translated, sizes = captured(Case()), {}, []
    with WeightFile(tmp_path / "layer.data", sizes.append) as weights:
        for recipe in (EXACT, FAST):
            weights.adopt(lower(program, recipe, translated))
    codes, scales, zeros = (
        sum(getattr(matrix, part).nbytes for matrix in module.each[0].matrices())
        for part in ("codes", "scales", "zeros")
    )
    # Small tensors stand in the models.
    assert codes + scales <= sum(sizes) <= codes + scales + zeros


def test_a_step_reads_the_chosen_experts(made: Callable[[str], Made]) -> None:
    taken = [
        layer for layer, case in zip(made("exact").layers.each, CASES.values(), strict=True) if "exact" in case.fused
    ]
    stored = [sum(b.nbytes for matrix in layer.matrices() for b in matrix.buffers()) for layer in taken]
    left = [0 if layer.router is all_of_them else EXPERTS - CHOSEN for layer in taken]
    assert unread(made("exact").model) == sum(size * c // EXPERTS for size, c in zip(stored, left, strict=True))
    assert unread(made("dense").model) == 0


@pytest.mark.parametrize(
    ("version", "fused"), [("1.31.1", True), ("1.100.0", True), ("1.30.0", False), ("nightly", False), (None, False)]
)
def test_an_older_runtime_is_given_no_operator_that_it_lacks(version: str | None, fused: bool) -> None:
    recipe = for_runtime(EXACT, version)
    assert (recipe == EXACT) == fused
    assert replace(recipe, passes=()) == replace(EXACT, passes=()) and len(EXACT.passes) - len(recipe.passes) <= 1
