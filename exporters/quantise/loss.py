"""What quantised weights cost: the mean KL divergence of the logits from the float student's, on rows of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from exporters.activations import Activation
from exporters.families.activation_hooks import round_inputs
from exporters.families.streaming import Call, Read, empty_model, logits, parts, student_reader, walk
from exporters.quantise.calibration import batch
from exporters.student import Student
from runtimes.metrics import kl_divergence


@dataclass
class _Variant:
    """The float student but for some matrices of one part: its hidden states once the walk is past that part."""

    part: str
    parameters: Sequence[str]
    hidden: Tensor | None = None


class Loss:
    """Losses against one float student on the same rows, whose float logits are computed once.

    Args:
        student: the float one.
        rows: int64 [L] each.
    """

    def __init__(self, student: Student, rows: Iterable[Tensor]) -> None:
        self._model, self._read = empty_model(student), student_reader(student)
        self._ids, self._kept = batch(tuple(rows))
        self._expected = [values[kept].numpy() for values, kept in self._kept_logits(self._read)]

    def of(self, student: Student) -> float:
        """Of the whole student, nats; inputs are rounded where the student has that."""
        model = empty_model(student)
        round_inputs(model, student.activations)
        return self._mean(self._kept_logits(student_reader(student), model))

    def of_each(
        self,
        groups: Mapping[str, Sequence[str]],
        student: Student,
        turn: Callable[[str], None] = lambda name: None,
    ) -> dict[str, float]:
        """Of each group of parameters alone taken from ``student``, rounded inputs included: group -> nats.

        ``turn`` is called with the name of each decoder layer and of each group whose turn it is.

        A group inside one decoder layer takes part in one walk for all of them, in which the hidden states of each are
        carried beside the float ones: the weights are read once. Others, such as an embedding that is the head too,
        take a walk of their own.
        """
        other = student_reader(student)
        names = {module: name for name, module in self._model.named_modules()}
        layers = [name for part in parts(self._model) if (name := names[part]).rpartition(".")[2].isdigit()]
        inside: dict[str, _Variant] = {}
        found: dict[str, float] = {}
        for key, parameters in groups.items():
            owners = {next((layer for layer in layers if name.startswith(f"{layer}.")), "") for name in parameters}
            if len(owners) == 1 and "" not in owners:
                inside[key] = _Variant(owners.pop(), parameters)
            else:
                turn(key)
                found[key] = self._mean(self._kept_logits(_mixed(self._read, other, parameters)))
        if inside:
            self._carry(tuple(inside.values()), other, student.activations, turn)
        for key, variant in inside.items():
            turn(key)
            assert variant.hidden is not None  # its layer ran
            found[key] = self._mean(zip(logits(self._model, variant.hidden, self._read), self._kept, strict=True))
        return {key: found[key] for key in groups}

    def _carry(
        self,
        variants: tuple[_Variant, ...],
        other: Read,
        activations: Mapping[str, Activation],
        turn: Callable[[str], None],
    ) -> None:
        """One walk; leaves in each variant its hidden states behind the final norm."""

        def visit(name: str, call: Call) -> None:
            turn(name)
            for variant in variants:
                if variant.hidden is not None:
                    variant.hidden = call.run(variant.hidden)
                elif variant.part == name:
                    owners = {p.rpartition(".")[0]: p[len(name) + 1 :] for p in variant.parameters}
                    rounded = {local.rpartition(".")[0]: activations.get(full) for full, local in owners.items()}
                    values = {p[len(name) + 1 :]: other(p) for p in variant.parameters}
                    with _replaced(call.module, values, {key: each for key, each in rounded.items() if each}):
                        variant.hidden = call.run()

        walk(self._model, self._ids, self._read, visit)

    def _kept_logits(self, read: Read, model: PreTrainedModel | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(logits [L, V], kept [L]) of one row after the other."""
        model = model or self._model
        return zip(logits(model, walk(model, self._ids, read), read), self._kept, strict=True)

    def _mean(self, found: Iterable[tuple[Tensor, Tensor]]) -> float:
        pairs = zip(self._expected, found, strict=True)
        values = [kl_divergence(expected, got[kept].numpy()) for expected, (got, kept) in pairs]
        return float(np.concatenate(values).mean())


def _mixed(read: Read, other: Read, parameters: Sequence[str]) -> Read:
    return lambda name: other(name) if name in parameters else read(name)


@contextmanager
def _replaced(part: nn.Module, values: Mapping[str, Tensor], activations: Mapping[str, Activation]) -> Iterator[None]:
    """Some parameters of a part are others inside the block, and the inputs of some of its modules are rounded."""
    own = {key: part.get_parameter(key) for key in values}

    def put(parameters: Mapping[str, nn.Parameter]) -> None:
        for key, parameter in parameters.items():
            owner, _, last = key.rpartition(".")
            setattr(part.get_submodule(owner), last, parameter)

    put({key: nn.Parameter(value, requires_grad=False) for key, value in values.items()})
    handles = round_inputs(part, activations)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        put(own)
