"""Calibration data of a language model: token rows from a folder, else from the student's own samples.

A folder holds .txt files, which the student's own tokenizer turns into tokens, or .safetensors files with ids int
[n, L] and, where rows are padded, length int [n]: the form of a package's samples/lm.safetensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from exporters.errors import ExportError
from exporters.student import Student
from exporters.tokenizer_files import encode_apart

#: Tokens that are looked at, and the longest row: more changes second moments little, and a CPU has its time.
MOST_TOKENS, LONGEST = 16_384, 512
#: The share of the rows that is kept apart to measure with: every fourth.
APART = 4
#: Positions that are measured at most, fewer where their logits would be more than so many numbers.
MOST_MEASURED, MOST_LOGITS = 1024, 32 << 20
#: Seconds for one file's text; a tokenizer's patterns may backtrack without end.
_SECONDS = 120.0
WAY_OUT = (
    "Name a folder of .txt or .safetensors files with --calibration, ship samples/lm.safetensors in the package, or "
    "choose a method without data: int8 or int4."
)


class CalibrationError(ExportError):
    """There is no calibration data, or it is not the student's."""


@dataclass(frozen=True)
class Calibration:
    """Rows of tokens, int64 [L] each, and where they come from."""

    rows: tuple[Tensor, ...]
    source: str

    @property
    def fitted(self) -> tuple[Tensor, ...]:
        """The rows that a method is fitted to; all of them where there are too few to keep any apart."""
        rows = tuple(row for i, row in enumerate(self.rows) if i % APART)
        return rows if len(self.rows) >= APART else self.rows

    def measured(self, vocabulary: int) -> tuple[Tensor, ...]:
        """The rows that losses are measured on, none of which a method is fitted to where there are enough."""
        most = min(MOST_MEASURED, max(64, MOST_LOGITS // vocabulary))
        chosen: list[Tensor] = []
        total = 0
        for row in self.rows[::APART]:
            if total >= most:
                break
            chosen.append(row[: most - total])
            total += len(chosen[-1])
        return tuple(chosen)


def load_calibration(student: Student, folder: Path | None) -> Calibration | None:
    """The rows of ``folder``, or without one of the package's samples; None where there are neither.

    Raises:
        CalibrationError: a folder without a usable file, or with tokens that the student does not have.
    """
    if folder is not None:
        files = sorted(path for path in _files(folder) if path.suffix in (".txt", ".safetensors"))
        if not files:
            raise CalibrationError("holds no .txt or .safetensors file", where=str(folder), way_out=WAY_OUT)
        rows = [row for path in files for row in _READERS[path.suffix](student, path)]
        source = f"{len(files)} file(s) of {folder.name}"
    else:
        path = student.folder / "samples" / "lm.safetensors"
        if not path.is_file():
            return None
        files, rows, source = [path], list(_stored_rows(student, path)), "the package's samples"
    taken = _limited(rows)
    if not taken:
        raise CalibrationError("holds no row of two tokens or more", where=str(folder or files[0]), way_out=WAY_OUT)
    return Calibration(tuple(torch.from_numpy(row.astype(np.int64)) for row in taken), source)


def batch(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(ids int64 [n, L], kept bool [n, L]); shorter rows are padded at the end, where nothing sees it."""
    longest = max(map(len, rows))
    ids, kept = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], kept[i, : len(row)] = row, True
    return ids, kept


def _files(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise CalibrationError("is not a folder", where=f"--calibration {folder}", way_out=WAY_OUT)
    return (path for path in folder.iterdir() if path.is_file())


def _limited(rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Rows cut to the longest length, spread over all that are there, until the tokens are enough."""
    cut = [row[at : at + LONGEST] for row in rows for at in range(0, len(row), LONGEST)]
    cut = [row for row in cut if len(row) > 1]
    if not cut:
        return []
    average = sum(map(len, cut)) / len(cut)
    count = max(1, min(len(cut), int(MOST_TOKENS // average)))
    return [cut[i * len(cut) // count] for i in range(count)]


def _text_rows(student: Student, path: Path) -> Iterator[np.ndarray]:
    if student.tokenizer is None:
        raise CalibrationError(
            "is text, and the student has no tokenizer", where=str(path), way_out="Give .safetensors files with ids."
        )
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"is not UTF-8 ({error})", where=str(path), way_out="Convert it.") from error
    # Nothing beyond what is looked at is tokenised: a token is rarely longer than 16 characters.
    [ids] = encode_apart(student.tokenizer, [text[: 16 * MOST_TOKENS]], _SECONDS)
    yield _checked(student, np.array(ids, np.int64), path)


def _stored_rows(student: Student, path: Path) -> Iterator[np.ndarray]:
    try:
        held = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"cannot be read ({error})", where=str(path), way_out="Write it again.") from error
    ids, length = held.get("ids"), held.get("length")
    fits = ids is not None and ids.ndim == 2 and ids.dtype.kind in "iu"
    if not fits or (length is not None and (length.shape != ids.shape[:1] or length.dtype.kind not in "iu")):
        raise CalibrationError(
            "holds no integer ids [n, L] with, at most, length [n]", where=str(path), way_out="Write it in that form."
        )
    for i, row in enumerate(ids):
        yield _checked(student, row if length is None else row[: int(length[i])], path)


def _checked(student: Student, row: np.ndarray, path: Path) -> np.ndarray:
    vocabulary = student.config["vocab_size"]
    if row.size and (int(row.min()) < 0 or int(row.max()) >= vocabulary):
        raise CalibrationError(
            f"holds token {int(row.max())} (lowest {int(row.min())}) of a vocabulary of {vocabulary}",
            where=str(path),
            way_out="Give rows that the student's own tokenizer made.",
        )
    return row


_READERS = {".txt": _text_rows, ".safetensors": _stored_rows}
