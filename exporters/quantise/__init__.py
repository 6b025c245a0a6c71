"""Quantising a float student, when its user asks for it: one method a file, and the table of methods.

    Student (float) ──quantise──► Student whose weights are QuantizedTensors; everything downstream is the same

The float student is the twin that the quantisation-loss gate then compares with. Linear layers of the decoder get the
width asked for; embeddings and the head, which few bits hurt most, 8 bits by row. Weights are read one decoder layer
at a time and what comes of them goes to files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from device_profiles.quantise import Quantise
from exporters.activations import Activation
from exporters.errors import ExportError
from exporters.families.streaming import Call, empty_model, student_reader, walk
from exporters.families.swaps import JOINED
from exporters.model_config import skeleton
from exporters.quantise import awq, gptq, smoothquant
from exporters.quantise.calibration import WAY_OUT, Calibration, CalibrationError, batch
from exporters.quantise.grids import Width, round_to_nearest
from exporters.quantise.layer import Layer
from exporters.quantise.loss import Loss
from exporters.quantise.mixed_precision import WIDE, Step, planned_steps, within_budget
from exporters.quantise.store import Store, folded, stored
from exporters.student import Student

#: Method -> what it does to one decoder layer; None rounds to nearest, for which nothing has to run.
METHODS: Mapping[str, Callable[[Layer, Width], None] | None] = {
    "round-to-nearest": None,
    "gptq": gptq.quantise_layer,
    "awq": awq.quantise_layer,
    "smoothquant": smoothquant.quantise_layer,
}

#: Matrices that are measured alone where no budget asks for it: each takes half a forward pass, and a model of many
#: experts has thousands.
MOST_ALONE = 512

Progress = Callable[[str, int], None]


class AlreadyQuantised(ExportError):
    """The student's own quantisation is carried over, never changed."""


@dataclass(frozen=True)
class Matrix:
    """One matrix, or several that one product joins: how it is stored ("int4 g32", "float"), its size in bytes, and
    what it costs alone at the width asked for (mean KL divergence in nats; None where that was not measured)."""

    name: str
    stored: str
    bytes: int
    kl: float | None


@dataclass(frozen=True)
class Quantised:
    """A student that the build quantised.

    Attributes:
        matrices: one row for each group that has one width, in the model's order.
        mean_kl: measured against the float student, None where there was nothing to measure on.
        calibration: what it was fitted to and measured on.
    """

    student: Student
    settings: Quantise
    matrices: tuple[Matrix, ...]
    mean_kl: float | None
    calibration: str

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values for the manifest."""
        return {
            "name": self.settings.name,
            **self.settings.as_dict(),
            "measured_kl": self.mean_kl,
            "calibration": self.calibration,
            "matrices": [asdict(row) for row in self.matrices],
        }


def quantise(
    student: Student, settings: Quantise, calibration: Calibration | None, folder: Path, progress: Progress
) -> Quantised:
    """Quantises a float student.

    Args:
        settings: with a method.
        folder: takes the matrices; it must stay as long as the student is used.

    Raises:
        AlreadyQuantised, CalibrationError, QuantisationFailed, FoldMismatch.
    """
    if student.quantized:
        raise AlreadyQuantised(
            "is already quantised: its own quantisation is carried over",
            where=str(student.folder),
            way_out="Leave --quantise out, or name the float student.",
        )
    assert settings.method is not None and settings.bits is not None
    work = METHODS[settings.method]
    if calibration is None and (work is not None or settings.mean_kl is not None):
        needs = f"{settings.method} is fitted to data" if work else "a quality budget is measured on data"
        raise CalibrationError(f"{needs}, and there is none", where=str(student.folder), way_out=WAY_OUT)
    width = Width(settings.bits, settings.columns)
    layers, others = _modules(student)
    if not layers:
        raise ExportError(
            "its decoder layers have no linear layers to quantise: their weights are stored transposed (Conv1D)",
            where=str(student.folder),
            way_out="Leave --quantise out: the model is exported in float.",
        )
    _check_groups(student, layers, width)
    folder.mkdir(parents=True, exist_ok=True)
    store = Store(folder, f"{settings.name} by the build")
    progress("quantise embedding and head", 0)
    for module in others:
        store.put(module, round_to_nearest(student.tensor(f"{module}.weight"), WIDE), WIDE)
    if work is None:
        for module in layers:
            progress(f"quantise {module}", 0)
            store.put(module, round_to_nearest(student.tensor(f"{module}.weight"), width), width)
    else:
        assert calibration is not None
        _fit(student, calibration, work, width, layers, store, progress)
    if settings.activations is not None:
        store.activations.update(dict.fromkeys(layers, Activation(settings.activations)))
    groups = _groups((*others, *layers))
    alone: dict[str, float] = {}
    mean_kl = None
    if calibration is not None:
        progress("measure the quantisation's loss", 0)
        loss = Loss(folded(student, store), calibration.measured(student.config["vocab_size"]))
        if settings.mean_kl is not None or (work is not None and len(groups) <= MOST_ALONE):
            parameters = {name: [f"{module}.weight" for module in modules] for name, modules in groups.items()}
            alone = loss.of_each(
                parameters, stored(student, store), lambda name: progress(f"measure the loss of {name}", 0)
            )
        if settings.mean_kl is None:
            mean_kl = loss.of(stored(student, store))
        else:
            mean_kl = _within_budget(student, store, groups, alone, loss, settings.mean_kl, progress)
    return Quantised(
        stored(student, store),
        settings,
        tuple(_row(student, store, name, modules, alone.get(name)) for name, modules in groups.items()),
        mean_kl,
        calibration.source if calibration else "",
    )


def _modules(student: Student) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(linear layers of the decoder layers, the other matrices: embeddings and an untied head)."""
    expected = skeleton(student.config)
    names = [name for name in expected.modules if f"{name}.weight" not in expected.tied]
    layers = tuple(name for name in names if any(part.isdigit() for part in name.split(".")))
    return layers, tuple(name for name in names if name not in layers)


def _check_groups(student: Student, modules: tuple[str, ...], width: Width) -> None:
    if width.group is None:
        return
    for module in modules:
        columns = student.tensors[f"{module}.weight"].shape[1]
        if columns % width.group:
            fitting = [size for size in (128, 64, 32, 16) if columns % size == 0]
            raise ExportError(
                f"groups of {width.group} columns do not divide K = {columns}",
                where=f"{module}.weight",
                way_out=f"--group {fitting[0]} divides it." if fitting else "Use int8, which has no groups.",
            )


def _fit(
    student: Student,
    calibration: Calibration,
    work: Callable[[Layer, Width], None],
    width: Width,
    modules: tuple[str, ...],
    store: Store,
    progress: Progress,
) -> None:
    """One walk over the model: each layer sees what the quantised layers before it produce."""
    ids, kept = batch(calibration.fitted)
    config = student.library_config()
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # The embedding is quantised already, and everything behind it is fitted to what it gives.
    read, plain = student_reader(stored(student, store)), student_reader(student)
    embeddings = {f"{module}.weight" for module in store}

    def visit(name: str, call: Call) -> None:
        if own := [module for module in modules if module.startswith(f"{name}.")]:
            progress(f"quantise {name}", 0)
            work(Layer(name, call, kept, own, head_width, store), width)

    walk(empty_model(student), ids, lambda name: (read if name in embeddings else plain)(name), visit)


def _groups(modules: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Matrices that share a width, as those that are joined into one product do: name -> modules."""
    found: dict[str, list[str]] = {}
    for module in modules:
        owner, _, last = module.rpartition(".")
        joined = next((name for name, parts in JOINED.items() if last in parts), last)
        found.setdefault(f"{owner}.{joined}" if owner else joined, []).append(module)
    return {name: tuple(each) for name, each in found.items()}


def _within_budget(
    student: Student,
    store: Store,
    groups: Mapping[str, tuple[str, ...]],
    alone: Mapping[str, float],
    loss: Loss,
    budget: float,
    progress: Progress,
) -> float:
    """The loss of the whole, once enough of the groups are wider; ``alone``: what each costs."""
    plain = folded(student, store)
    steps = {}
    for name, modules in groups.items():
        width = store.widths[modules[0]]
        sizes = [sum(_bytes(student, module, each) for module in modules) for each in (width, WIDE, None)]
        steps[name] = planned_steps(name, width, alone[name], _finer(plain, store, modules), sizes)

    def raise_(step: Step) -> None:
        progress(f"keep {step.group} in {step.width or 'float'}", 0)
        for module in groups[step.group]:
            if step.width is None:
                store.drop(module)
            else:
                store.put(module, round_to_nearest(plain.tensor(f"{module}.weight"), step.width), step.width)

    return within_budget(steps, raise_, lambda: loss.of(stored(student, store)), budget)


def _finer(plain: Student, store: Store, modules: tuple[str, ...]) -> float:
    """Squared error of a group at 8 bits as a share of what it is now."""
    now = wide = 0.0
    for module in modules:
        weight = plain.tensor(f"{module}.weight").float()
        now += float((torch.from_numpy(store[module].dequantize()) - weight).square().sum())
        wide += float((round_to_nearest(weight, WIDE).dequantize() - weight).square().sum())
    return min(1.0, wide / now) if now else 1.0


def _bytes(student: Student, module: str, width: Width | None) -> int:
    """Stored size of a matrix; float ones as the student stores them."""
    info = student.tensors[f"{module}.weight"]
    if width is None:
        return info.nbytes
    rows, columns = info.shape
    groups = rows * (columns // width.columns(columns))
    return rows * columns * width.bits // 8 + groups * (4 if width.group is None else 5)


def _row(student: Student, store: Store, name: str, modules: tuple[str, ...], alone: float | None) -> Matrix:
    width = store.widths.get(modules[0])
    size = sum(_bytes(student, module, width) for module in modules)
    return Matrix(name, str(width) if width else "float", size, alone)
