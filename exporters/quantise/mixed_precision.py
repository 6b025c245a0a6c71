"""Mixed precision by budget: the matrices that cost most are kept wider until the whole loses little enough.

Losses of single groups nearly add up, and a grid that is finer by some factor loses less by its square; so both are
predictions, and what counts is the loss of the whole, measured after every step. The steps are taken by how much loss
they are predicted to save for each byte that they add.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from exporters.errors import ExportError
from exporters.quantise.grids import Width

#: What a wider matrix is stored as: 8 bits, one scale for each row.
WIDE = Width(8)


class QuantisationFailed(ExportError):
    """The quality budget leaves nothing to quantise."""


@dataclass(frozen=True)
class Step:
    """A group on its way from one width to the next (None: float).

    Attributes:
        saved: nats that are predicted to be saved, and ``added`` the bytes that it takes.
    """

    group: str
    width: Width | None
    saved: float
    added: int


def within_budget(
    steps: Mapping[str, Sequence[Step]], raise_: Callable[[Step], None], loss: Callable[[], float], budget: float
) -> float:
    """Takes steps until the measured loss is within the budget; returns that loss.

    Args:
        steps: group -> its steps, from narrow to float.
        raise_: takes a step.
        loss: measures the whole as it now is, nats.

    Raises:
        QuantisationFailed: every group is float and nothing is left to raise.
    """
    waiting = {group: list(each) for group, each in steps.items()}
    predicted = sum(step.saved for each in steps.values() for step in each)
    found = loss()
    while found > budget:
        # What was measured is above or below the sum of the parts; the target moves along.
        target = predicted * budget / found
        first = True
        while any(waiting.values()) and (first or predicted > target):
            step = max((each[0] for each in waiting.values() if each), key=lambda step: step.saved / step.added)
            waiting[step.group].pop(0)
            raise_(step)
            predicted -= step.saved
            first = False
        if not any(waiting.values()):
            raise QuantisationFailed(
                f"a mean KL of {budget:g} needs every matrix in float (the last one costs {found:.2g})",
                where="mean_kl",
                way_out="Allow more, or leave the quantisation out.",
            )
        found = loss()
    return found


def planned_steps(group: str, width: Width, alone: float, finer: float, sizes: Sequence[int]) -> tuple[Step, ...]:
    """The steps of one group.

    Args:
        width: that it has.
        alone: its loss in nats.
        finer: squared error at 8 bits as a share of that at ``width``.
        sizes: bytes at ``width``, at 8 bits and in float.
    """
    narrow, wide, full = sizes
    if width.bits == WIDE.bits:
        return (Step(group, None, alone, full - narrow),)
    left = alone * finer
    return Step(group, WIDE, alone - left, wide - narrow), Step(group, None, left, full - wide)
