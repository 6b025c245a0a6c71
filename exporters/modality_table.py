"""The modality table of package.json, checked against the discretizers and the vocabulary."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.discretizer_config import check_discretizer_config
from exporters.errors import PackageError
from exporters.package_schema import MANIFEST, ModalityEntry
from exporters.safe_files import check_relative
from exporters.strict_json import read_json


@dataclass(frozen=True)
class Modality:
    """One modality of a student: its token range [first, end) and how a signal is laid out in it."""

    name: str
    first: int
    end: int
    codebooks: int = 1
    codebook_size: int = 0
    grid: tuple[int, ...] = ()
    begin: str | None = None
    end_token: str | None = None
    discretizer: Path | None = None
    preprocessing: Mapping[str, Any] | None = None
    begin_id: int | None = None  # filled in by exporters.student, from the tokenizer
    end_id: int | None = None


def _modality(folder: Path, name: str, entry: ModalityEntry, files: Mapping[str, Any]) -> Modality:
    where = f"{folder / MANIFEST}: modalities.{name}"
    first, end = entry.tokens
    if first >= end:
        raise PackageError(f"empty token range {entry.tokens}", where=where, way_out="tokens is [first, end)")
    wanted = ("codebooks", "codebook_size", "grid", "begin", "end", "discretizer")
    given = [key for key in wanted if getattr(entry, key) is not None]
    if name == "text":
        if given:
            raise PackageError(f"text takes no {', '.join(given)}", where=where, way_out="Leave them out")
        return Modality(name, first, end)
    codebooks, size, grid = entry.codebooks, entry.codebook_size, entry.grid
    begin, finish, place = entry.begin, entry.end, entry.discretizer
    if codebooks is None or size is None or grid is None or begin is None or finish is None or place is None:
        missing = ", ".join(key for key in wanted if key not in given)
        raise PackageError(f"{missing} missing", where=where, way_out="Every modality but text needs them")
    if codebooks * size != end - first:
        raise PackageError(
            f"{codebooks} codebooks of {size} are {codebooks * size} tokens, the range {entry.tokens} holds"
            f" {end - first}",
            where=where,
            way_out="Make the range codebooks * codebook_size long",
        )
    if codebooks > 1 and grid[-1] != codebooks:
        raise PackageError(
            f"the last axis of grid {grid} is not the {codebooks} codebooks", where=where, way_out="Correct the grid"
        )
    if begin == finish:
        raise PackageError(f"begin and end are both {begin!r}", where=where, way_out="Use two tokens")
    check_relative(place, f"{where}.discretizer")
    if f"{place}/config.json" not in files:
        raise PackageError(f"{place}/config.json is missing", where=where, way_out="Add the discretizer")
    if not any(f"{place}/{weights}" in files for weights in ("model.safetensors", "model.pth")):
        raise PackageError(
            f"{place} has neither model.safetensors nor model.pth", where=where, way_out="Add its weights"
        )
    config = read_json(folder / place / "config.json")
    check_discretizer_config(config, f"{place}/config.json", codebooks, size, tuple(grid))
    return Modality(
        name, first, end, codebooks, size, tuple(grid), begin, finish, folder / place, config["preprocessing"]
    )


def modality_table(
    folder: Path, table: Mapping[str, ModalityEntry], vocab_size: int, files: Mapping[str, Any]
) -> dict[str, Modality]:
    """Modalities by name; raises PackageError when ranges overlap, pass the vocabulary or miss their discretizer."""
    result = {name: _modality(folder, name, entry, files) for name, entry in table.items()}
    ordered = sorted(result.values(), key=lambda item: item.first)
    for before, after in itertools.pairwise(ordered):
        if after.first < before.end:
            raise PackageError(
                f"the token ranges of {before.name} [{before.first}, {before.end}) and {after.name}"
                f" [{after.first}, {after.end}) overlap",
                where=f"{folder / MANIFEST}: modalities",
                way_out="Give each modality its own range",
            )
    if ordered[-1].end > vocab_size:
        raise PackageError(
            f"the token range of {ordered[-1].name} ends at {ordered[-1].end}, past vocab_size {vocab_size}",
            where=f"{folder / MANIFEST}: modalities.{ordered[-1].name}",
            way_out="Correct the range, or vocab_size in config.json",
        )
    return result
