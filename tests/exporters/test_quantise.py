"""Quantising a float student, layer by layer, against transformers' own whole model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from device_profiles import load_profile
from device_profiles.quantise import RECIPES, Quantise
from exporters.backends import Job
from exporters.families import streaming
from exporters.families.decoder_lm import build_reference, capture_lm
from exporters.families.streaming import empty_model, logits, student_reader, walk
from exporters.inheritance import compare
from exporters.onnx_ import OnnxExporter
from exporters.quantise import Quantised, awq, folding, quantise, smoothquant
from exporters.quantise.calibration import Calibration, batch, load_calibration
from exporters.quantise.grids import Width, round_to_nearest
from exporters.quantise.layer import Layer
from exporters.quantise.loss import Loss
from exporters.quantise.mixed_precision import QuantisationFailed, Step, within_budget
from exporters.quantise.store import Store, folded, stored
from exporters.student import Student, load_student
from runtimes.metrics import kl_divergence
from tests.conftest import MakeStudent
from tests.exporters.quantise_layers import correlated, eager_logits, library_student

FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"num_key_value_heads": 1},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 4},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 4},
}


def settings(recipe: str, **options: object) -> Quantise:
    method, bits, activations = RECIPES[recipe]
    return Quantise(
        method=method, bits=bits, activations=activations, **({"group": 16 if bits == 4 else None} | options)
    )  # type: ignore[arg-type]


def rows(student: Student, lengths: tuple[int, ...] = (9, 24, 17, 5, 24, 24)) -> Calibration:
    generator = torch.Generator().manual_seed(1)
    vocabulary = student.config["vocab_size"]
    return Calibration(tuple(torch.randint(vocabulary, (n,), generator=generator) for n in lengths), "random rows")


def quantised(student: Student, folder: Path, recipe: str, **options: object) -> Quantised:
    return quantise(student, settings(recipe, **options), rows(student), folder, lambda stage, size: None)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Products as small as these take longer to hand out than to compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Student] = {}

    def make(kind: str) -> Student:
        if kind not in made:
            made[kind] = library_student(tmp_path_factory.mktemp(kind), kind, **FAMILIES[kind])
        return made[kind]

    return make


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_walk_over_the_layers_is_the_whole_model(library, kind):
    student = library(kind)
    ids, kept = batch(rows(student).rows)
    model, read = empty_model(student), student_reader(student)
    hidden = walk(model, ids, read)
    expected = eager_logits(student, ids)
    for got, wanted, mask in zip(logits(model, hidden, read), expected, kept, strict=True):
        assert torch.allclose(got[mask], wanted[mask], atol=1e-5 * float(wanted.abs().max()))
    # Nothing stays: the next walk reads every weight again.
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("kind", FAMILIES)
def test_rows_that_are_computed_in_turns_give_the_same(library, monkeypatch, tmp_path, kind):
    """Hidden states, the statistics of every stage and what a changed weight leads to, three rows at a time."""
    student, width = library(kind), Width(4, 16)
    ids, _ = batch(rows(student).rows)

    def results() -> list[torch.Tensor]:
        found: list[torch.Tensor] = []

        def work(layer: Layer) -> None:
            for stage, held in layer.statistics(layer.stages()).items():
                found.extend((held.hessian, held.mean, held.largest))
                layer.put(stage.linears[0], round_to_nearest(layer.weight(stage.linears[0]), width), width)
            found.append(layer.output())

        def visit(name, call):
            turns.append(len(call.slices))
            if name.endswith("layers.0"):
                work(Layer(name, call, kept, modules, 16, Store(tmp_path, "test")))

        modules = [name.removesuffix(".weight") for name in student.tensors if name.endswith("_proj.weight")]
        kept = batch(rows(student).rows)[1]
        found.append(walk(empty_model(student), ids, student_reader(student), visit))
        return found

    turns: list[int] = []
    whole = results()
    assert set(turns) == {1}
    turns.clear()
    monkeypatch.setattr(streaming, "TOKENS", 3 * ids.shape[1])
    parts = results()
    assert set(turns) == {2}
    for one, two in zip(whole, parts, strict=True):
        assert torch.allclose(one[: len(two)], two, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


def visit_first_layer(student: Student, store: Store, work) -> None:
    """Hands the first decoder layer, as it runs, to ``work``."""
    ids, kept = batch(rows(student).rows)
    modules = [name.removesuffix(".weight") for name in student.tensors if name.endswith("_proj.weight")]

    def visit(name, call):
        if name.endswith("layers.0"):
            work(Layer(name, call, kept, modules, 16, store))

    walk(empty_model(student), ids, student_reader(student), visit)


def test_stages_are_the_linear_layers_that_share_an_input(library, tmp_path):
    found = []
    visit_first_layer(library("gemma2"), Store(tmp_path, "test"), lambda layer: found.extend(layer.stages()))
    last = [[name.rpartition(".")[2] for name in stage.linears] for stage in found]
    assert last == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    norms = [stage.norm and stage.norm.rpartition(".")[2] for stage in found]
    assert norms == ["input_layernorm", None, "pre_feedforward_layernorm", None]


def test_second_moments_leave_padding_out(library, tmp_path):
    student, found = library("llama"), {}
    visit_first_layer(student, Store(tmp_path, "test"), lambda layer: found.update(layer.statistics(layer.stages())))
    first = next(value for stage, value in found.items() if stage.norm)
    model = build_reference(student)
    inputs = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    with torch.no_grad():
        for row in rows(student).rows:
            model(row[None], use_cache=False)
    every = torch.cat(inputs).double()
    assert torch.allclose(first.hessian, every.T @ every / len(every), atol=1e-6 * float(first.hessian.max()))
    assert torch.allclose(first.mean, every.abs().mean(0).float(), rtol=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_scale_that_is_folded_changes_nothing_but_the_weights(library, tmp_path, kind):
    student, store = library(kind), Store(tmp_path, "test")

    def work(layer):
        for stage in layer.stages():
            count = folding.channels(layer, stage)
            assert count, f"{stage} takes no scale"
            folding.fold(layer, stage, torch.linspace(0.25, 4, count))

    visit_first_layer(student, store, work)
    changed = folded(student, store)
    ids = rows(student).rows[1][None]
    expected, got = eager_logits(student, ids), eager_logits(changed, ids)
    assert (got - expected).abs().max() < 2e-5 * expected.abs().max()
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(changed.tensor(name), student.tensor(name))


def test_the_search_of_awq_ends_below_plain_rounding(library, tmp_path):
    ratios, width = [], Width(4, 16)

    def lost(weights, columns, hessian):
        rounded = [round_to_nearest(weight * columns, width).dequantize() / columns for weight in weights]
        return sum(awq.output_error(*pair, hessian) for pair in zip(weights, rounded, strict=True))

    def work(layer):
        for stage in layer.stages():
            found = layer.statistics([stage])[stage]
            scales = awq.search(layer, stage, found, width)
            if scales is not None:
                columns = folding.spread(layer, stage, scales)
                weights = [layer.weight(name) for name in stage.linears]
                ratios.append(
                    lost(weights, columns, found.hessian) / lost(weights, torch.ones_like(columns), found.hessian)
                )

    visit_first_layer(library("llama"), Store(tmp_path, "test"), work)
    assert ratios
    assert all(ratio < 1 for ratio in ratios)


def test_the_error_of_the_outputs_is_what_the_second_moments_say():
    weight, inputs = correlated()
    rounded = round_to_nearest(weight, Width(4, 32)).dequantize()
    hessian = inputs.double().T @ inputs.double() / len(inputs)
    direct = (inputs.double() @ (rounded - weight).double().T).square().sum(1).mean()
    assert awq.output_error(weight, rounded, hessian) == pytest.approx(float(direct), rel=1e-9)


def test_smoothing_evens_out_what_activations_and_weights_reach():
    weight, inputs = correlated()
    inputs[:, 7] *= 100
    scales = smoothquant.smoothing(inputs.abs().amax(0), [weight])
    assert torch.allclose((inputs / scales).abs().amax(0), (weight * scales).abs().amax(0), rtol=1e-4)
    assert torch.allclose((inputs / scales) @ (weight * scales).T, inputs @ weight.T, atol=1e-3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_method_replaces_every_matrix_and_loses_what_its_bits_allow(library, tmp_path, recipe):
    student = library("llama")
    made = quantised(student, tmp_path, recipe)
    assert not [name for name in made.student.tensors if name.endswith(("_proj.weight", "embed_tokens.weight"))]
    ids = rows(student).rows[0][None]
    lost = kl_divergence(*(eager_logits(each, ids).numpy()[0] for each in (student, made.student)))
    assert 0 < lost.mean() < (1.0 if "int4" in recipe else 0.05)


@pytest.mark.parametrize(
    ("recipe", "most", "measured"), [("int4-gptq", 512, True), ("int4-gptq", 3, False), ("int4", 512, False)]
)
def test_each_matrix_is_measured_alone_where_data_are_needed_and_matrices_few(
    library, tmp_path, monkeypatch, recipe, most, measured
):
    monkeypatch.setattr("exporters.quantise.MOST_ALONE", most)
    made = quantised(library("llama"), tmp_path, recipe)
    assert {row.kl is not None for row in made.matrices} == {measured}
    assert made.mean_kl > 0  # the whole is measured either way
    if measured:
        assert max(row.kl for row in made.matrices) < 2 * made.mean_kl < 2 * 2 * sum(row.kl for row in made.matrices)


def test_what_was_quantised_reaches_an_artifact_bit_for_bit(library, tmp_path):
    """With folds in norms and rows, and two widths in one model."""
    student = library("llama")
    made = quantised(student, tmp_path, "int4-awq", mean_kl=0.1)
    assert {made.student.quantized[name].bits for name in made.student.quantized} == {4, 8}
    program = capture_lm(made.student, 64)
    [artifact] = OnnxExporter().export(Job(program, load_profile("host"), tmp_path / "out", [("fused", "exact")]))
    held = OnnxExporter().read_matrices(tmp_path / "out", artifact, program)
    found = compare(artifact.label, program, held, made.student.quantized)
    assert found.identical == found.total == 3 * len(made.student.quantized)


def test_rounded_inputs_are_part_of_the_student_and_of_its_loss(library, tmp_path):
    """w8a8: weights as without them, one scale for each token, and a loss that transformers' own modules confirm."""
    student = library("qwen2")
    plain = quantised(student, tmp_path / "plain", "int8-smoothquant")
    both = quantised(student, tmp_path / "both", "w8a8-smoothquant", mean_kl=10.0)
    assert set(both.student.activations) == {name for name in both.student.quantized if name.endswith("_proj")}
    name = "model.layers.1.mlp.down_proj"
    assert np.array_equal(both.student.quantized[name].codes, plain.student.quantized[name].codes)
    measured = rows(student).measured(student.config["vocab_size"])
    models = [build_reference(student), build_reference(both.student)]
    with torch.no_grad():
        found = [[m(row[None], use_cache=False).logits[0].numpy() for m in models] for row in measured]
    expected = float(np.concatenate([kl_divergence(*pair) for pair in found]).mean())
    assert both.mean_kl == pytest.approx(expected, rel=1e-2)
    # A group alone has its inputs rounded too, so it costs more than its weights.
    weights, inputs = plain.student, both.student
    groups = {"down": [f"{name}.weight"]}
    loss = Loss(student, measured)
    assert loss.of_each(groups, inputs)["down"] > loss.of_each(groups, weights)["down"]


def test_the_loss_of_each_group_is_what_the_whole_model_says(library, tmp_path):
    student = library("qwen2")  # an untied head, biases
    made = quantised(student, tmp_path, "int4")
    measured = rows(student).measured(student.config["vocab_size"])
    groups = {
        "embedding": ["model.embed_tokens.weight"],
        "head": ["lm_head.weight"],
        "first": ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"],
        "last": ["model.layers.1.mlp.down_proj.weight"],
    }
    loss = Loss(student, measured)
    found = loss.of_each(groups, made.student)
    for name, parameters in groups.items():
        plain, changed = build_reference(student), build_reference(student)
        with torch.no_grad():
            for parameter in parameters:
                values = made.student.quantized[parameter.removesuffix(".weight")].dequantize()
                changed.get_parameter(parameter).copy_(torch.from_numpy(values))
            pairs = [[m(row[None], use_cache=False).logits[0].numpy() for m in (plain, changed)] for row in measured]
        expected = np.concatenate([kl_divergence(*pair) for pair in pairs]).mean()
        assert found[name] == pytest.approx(float(expected), rel=1e-3), name
    assert loss.of(student) < 1e-9
    assert loss.of(made.student) == pytest.approx(made.mean_kl)


def test_a_budget_keeps_the_matrices_that_cost_most_wider(library, tmp_path):
    student = library("llama")
    free = quantised(student, tmp_path / "free", "int4")
    bound = quantised(student, tmp_path / "bound", "int4", mean_kl=free.mean_kl / 4)
    assert bound.mean_kl <= free.mean_kl / 4
    stored_as = {row.name: row.stored for row in bound.matrices}
    assert {"int4 g16", "int8 per row"} <= set(stored_as.values())
    # Wider only where it pays: of equal size, what is kept at 4 bits cost less alone.
    downs = {row.name: row for row in bound.matrices if row.name.endswith("down_proj")}
    wide = [row.kl for row in downs.values() if row.stored != "int4 g16"]
    narrow = [row.kl for row in downs.values() if row.stored == "int4 g16"]
    assert not wide or not narrow or min(wide) > max(narrow)
    for name, stored_form in stored_as.items():
        if stored_form == "int8 per row" and "layers.0.mlp.down" in name:
            assert bound.student.quantized[name].bits == 8


@pytest.mark.parametrize("budget", [0.5, 0.1, 0.01])
def test_steps_are_taken_until_the_measured_loss_is_within_the_budget(budget):
    """Losses that add up to half as much again as predicted: what counts is what is measured."""
    steps = {f"g{i}": (Step(f"g{i}", Width(8), 0.1 * i, 10), Step(f"g{i}", None, 0.002 * i, 20)) for i in range(1, 5)}
    left = {name: sum(step.saved for step in each) for name, each in steps.items()}
    taken: list[Step] = []

    def raise_(step: Step) -> None:
        taken.append(step)
        left[step.group] -= step.saved

    assert within_budget(steps, raise_, lambda: 1.5 * sum(left.values()), budget) <= budget
    assert [step.group for step in taken][:2] == ["g4", "g3"]  # the most loss for each byte first


def test_a_budget_that_leaves_nothing_to_quantise_is_refused(library, tmp_path):
    with pytest.raises(QuantisationFailed, match="every matrix in float"):
        quantised(library("llama"), tmp_path, "int8", mean_kl=1e-12)


def test_a_float_student_keeps_its_files_and_its_ties(library, tmp_path):
    student = library("llama")
    made = quantised(student, tmp_path, "int8")
    assert made.student.tied == student.tied
    assert "lm_head" not in made.student.quantized
    made.student.verify_unchanged()


def test_samples_are_rows_without_their_padding(make_tiny_student: MakeStudent):
    student = load_student(make_tiny_student(variant="float"))
    found = load_calibration(student, None)
    assert found is not None
    assert len(found.rows) == 10
    assert {len(row) for row in found.rows} != {max(map(len, found.rows))}
    kept_apart = {id(row) for row in found.measured(136)}
    assert kept_apart.isdisjoint(map(id, found.fitted))


def test_texts_are_tokenised_by_the_student(make_tiny_student: MakeStudent, tmp_path):
    student = load_student(make_tiny_student(variant="float"))
    (tmp_path / "a.txt").write_text("a handwritten seven say three", "utf-8")
    found = load_calibration(student, tmp_path)
    assert found is not None
    from tokenizers import Tokenizer

    expected = Tokenizer.from_file(str(student.tokenizer)).encode("a handwritten seven say three").ids
    assert [row.tolist() for row in found.rows] == [expected]


def test_a_student_of_the_store_reads_what_was_put(library, tmp_path):
    student, store = library("llama"), Store(tmp_path, "test")
    name = "model.layers.0.mlp.down_proj"
    weight = student.tensor(f"{name}.weight")
    for width in (Width(4, 16), Width(8)):
        store.put(name, grid := round_to_nearest(weight, width), width)
        assert np.array_equal(stored(student, store).quantized[name].dequantize(), grid.dequantize().numpy())
    store.drop(name)
    assert f"{name}.weight" in stored(student, store).tensors
