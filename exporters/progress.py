"""How far a build is: the callback that every stage reports to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

#: Called with the name of a stage and the bytes that it has just dealt with (0 at its start).
Progress = Callable[[str, int], None]
#: The same for one stage.
Bytes = Callable[[int], None]


@runtime_checkable
class Expecting(Protocol):
    """A callback that also wants to know how much there will be, as a bar does."""

    def expect(self, stage: str, total: int) -> None:
        """The bytes that a stage will deal with, told before its first report."""


def begin(progress: Progress, stage: str, total: int | None = None) -> Bytes:
    """Reports the start of a stage; returns the callback for its bytes.

    Args:
        total: bytes that the stage will report, None where that is not known.
    """
    if total is not None and isinstance(progress, Expecting):
        progress.expect(stage, total)
    progress(stage, 0)
    return lambda size: progress(stage, size)


def ignore(size: int) -> None:
    """The callback of a caller that wants none."""


def folder_bytes(folder: Path) -> int:
    """The bytes of all files below a folder; 0 where there is none, which whoever reads it will say."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
