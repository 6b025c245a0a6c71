"""The delivery package on disk: schema, validator and writer.

Layout (one atomic unit; every file but package.json is listed in it with size and SHA-256)::

    config.json  generation_config.json
    model-00001-of-0000N.safetensors ...  model.safetensors.index.json
    tokenizer/{tokenizer.json,tokenizer_config.json,special_tokens_map.json,added_tokens.json}
    discretizers/<modality>/{config.json, model.safetensors | model.pth}
    samples/ (optional)  quality.json (optional)  MODEL_CARD.md  DATA_CARD.md
    package.json

`package.json` is the `Manifest` below; `Manifest.model_json_schema()` is its JSON schema. Token ranges are
[first, end). A signal is `begin`, then prod(grid) code tokens in row-major order, then `end`. With several codebooks
the last grid axis is the codebook and the token of code c in codebook k is first + k*codebook_size + c.

Every component's config.json says "student_version", equal to package.json's version. The constants of preprocessing
live in `discretizers/<modality>/config.json` under "preprocessing" and nowhere else: for images
{"size", "channels", "mean", "std"} (pixels in 0..1, (x-mean)/std), for audio {"sample_rate", "samples", "channels",
"peak"} (mono, trimmed or zero-padded at the end, scaled to that peak).

A plain transformers folder (no package.json) is accepted too, as a text-only student of version 0.0.0.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from exporters.discretizer_config import check_discretizer_config
from exporters.errors import PackageError
from exporters.safe_files import FileEntry, check_relative, hash_file, hash_whole, list_files, read_json

MANIFEST = "package.json"
PLAIN_FILES = re.compile(
    r"config\.json|generation_config\.json|model[^/]*\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
)
_VERSION = r"^(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})(-[0-9A-Za-z.-]{1,64})?$"
_Count = Annotated[StrictInt, Field(ge=1, le=1 << 24)]
_Range = Annotated[list[Annotated[StrictInt, Field(ge=0, le=1 << 24)]], Field(min_length=2, max_length=2)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ModalityEntry(_Model):
    """One row of the modality table; text has `tokens` alone, every other modality has all fields."""

    tokens: _Range
    codebooks: _Count | None = None
    codebook_size: _Count | None = None
    grid: Annotated[list[_Count], Field(min_length=1, max_length=4)] | None = None
    begin: Annotated[StrictStr, Field(min_length=1, max_length=200)] | None = None
    end: Annotated[StrictStr, Field(min_length=1, max_length=200)] | None = None
    discretizer: Annotated[StrictStr, Field(min_length=1, max_length=200)] | None = None


class FileModel(_Model):
    """Size in bytes and SHA-256 of one file."""

    size: Annotated[StrictInt, Field(ge=0)]
    sha256: Annotated[StrictStr, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(_Model):
    """The content of package.json."""

    format: Literal[1]
    name: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    version: Annotated[StrictStr, Field(pattern=_VERSION)]
    license: Annotated[StrictStr, Field(min_length=1, max_length=200)]
    modalities: Annotated[
        dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")], ModalityEntry], Field(min_length=1)
    ]
    files: dict[StrictStr, FileModel]
    sha256: Annotated[StrictStr, Field(pattern=r"^[0-9a-f]{64}$")]


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


@dataclass(frozen=True)
class Package:
    """A validated package: what package.json says, with every file checked against it."""

    folder: Path
    name: str
    version: str
    license: str
    modalities: Mapping[str, Modality]
    files: Mapping[str, FileEntry]
    sha256: str
    plain: bool = False
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def path(self, name: str) -> Path | None:
        """The path of a listed file, or None when the package has no such file."""
        return self.folder / name if name in self.files else None

    @property
    def tokenizer_prefix(self) -> str:
        """Where the tokenizer files lie, relative to the folder."""
        return "" if self.plain else "tokenizer/"


def _parse_manifest(path: Path) -> Manifest:
    raw = read_json(path)
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        at = ".".join(str(part) for part in first["loc"])
        raise PackageError(
            f"{first['msg']} ({error.error_count()} such fields)" if error.error_count() > 1 else first["msg"],
            where=f"{path}: {at}",
            way_out="The schema is exporters.package.Manifest",
        ) from error


def _check_listing(folder: Path, listed: Mapping[str, FileModel], found: Mapping[str, Path]) -> None:
    for name in listed:
        check_relative(name, f"{folder / MANIFEST}: files")
    for name in listed:
        if name not in found:
            raise PackageError("is listed in package.json but missing", where=name, way_out="Fetch the package again")
    for name in found:
        if name not in listed and name != MANIFEST:
            raise PackageError(
                "is not listed in package.json", where=name, way_out="Remove it, or run write_manifest again"
            )


def _check_hashes(found: Mapping[str, Path], listed: Mapping[str, FileModel]) -> dict[str, FileEntry]:
    entries = {}
    for name, wanted in sorted(listed.items()):
        # The size is compared first so that a file that grew without bound is never read.
        size = found[name].stat().st_size
        entry = hash_file(found[name]) if size == wanted.size else FileEntry(size, "")
        if entry != FileEntry(wanted.size, wanted.sha256):
            what = f"size {entry.size}, listed {wanted.size}" if entry.size != wanted.size else "SHA-256 differs"
            raise PackageError(
                f"does not match package.json ({what})", where=name, way_out="Fetch the package again, whole"
            )
        entries[name] = entry
    return entries


def _check_versions(folder: Path, version: str, files: Mapping[str, Any]) -> None:
    components = ["config.json", "tokenizer/tokenizer_config.json"]
    components += [name for name in files if re.fullmatch(r"discretizers/[^/]+/config\.json", name)]
    for name in components:
        if name not in files:
            continue
        found = read_json(folder / name).get("student_version")
        if found != version:
            raise PackageError(
                f"student_version is {found!r}, the package is {version!r}",
                where=name,
                way_out="Take all components from one release of the student",
            )


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


def _modalities(
    folder: Path, table: Mapping[str, ModalityEntry], vocab_size: int, files: Mapping[str, Any]
) -> dict[str, Modality]:
    result = {name: _modality(folder, name, entry, files) for name, entry in table.items()}
    ordered = sorted(result.values(), key=lambda item: item.first)
    for before, after in zip(ordered, ordered[1:], strict=False):
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
            where=f"{folder / MANIFEST}: modalities",
            way_out="Correct the range, or vocab_size in config.json",
        )
    return result


def _vocab_size(config: Mapping[str, Any], where: str) -> int:
    size = config.get("vocab_size")
    if isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= 1 << 24:
        raise PackageError(f"vocab_size is {size!r}", where=where, way_out="Give a positive whole number")
    return size


def _validate_plain(folder: Path) -> Package:
    names = {
        path.name: path for path in sorted(folder.iterdir()) if PLAIN_FILES.fullmatch(path.name)
    }
    if "config.json" not in names:
        raise PackageError(
            "has neither package.json nor config.json",
            where=str(folder),
            way_out="Point at a delivery package or a transformers checkpoint folder",
        )
    files = {name: hash_file(path) for name, path in names.items()}
    config = read_json(folder / "config.json")
    size = _vocab_size(config, str(folder / "config.json"))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._") or "student"
    text = {"text": Modality("text", 0, size)}
    return Package(folder, name, "0.0.0", "unknown", text, files, hash_whole(files), plain=True, config=config)


def validate(folder: str | Path) -> Package:
    """Check a delivery package, or a plain transformers folder, without importing torch.

    Every file is hashed once. Weights are not opened here: `exporters.student.load_student` does that.

    Raises PackageError (UnsafePath, ConfigError, ...) naming the file or field.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PackageError("is not a folder", where=str(folder), way_out="Point at a delivery package")
    if not (folder / MANIFEST).exists():
        return _validate_plain(folder)
    found = list_files(folder)
    manifest = _parse_manifest(folder / MANIFEST)
    _check_listing(folder, manifest.files, found)
    files = _check_hashes(found, manifest.files)
    if hash_whole(files) != manifest.sha256:
        raise PackageError("sha256 is not that of its list of files", where=MANIFEST, way_out="Fetch the package again")
    return _checked(folder, manifest, files)


def _checked(folder: Path, manifest: Manifest, files: Mapping[str, FileEntry]) -> Package:
    if "config.json" not in files:
        raise PackageError("config.json is missing", where=str(folder), way_out="Fetch the package again")
    _check_versions(folder, manifest.version, files)
    config = read_json(folder / "config.json")
    size = _vocab_size(config, "config.json")
    modalities = _modalities(folder, manifest.modalities, size, files)
    return Package(
        folder, manifest.name, manifest.version, manifest.license, modalities, files, manifest.sha256, config=config
    )


def write_manifest(
    folder: str | Path, name: str, version: str, license: str, modalities: Mapping[str, Mapping[str, Any]]
) -> Package:
    """Hash every file below `folder` and write package.json last, atomically.

    Args:
        modalities: rows as in package.json, e.g. {"text": {"tokens": [0, 384]}, "image": {...}}.

    Nothing is written unless the package that it would describe is valid.
    """
    folder = Path(folder)
    files = {path: hash_file(full) for path, full in list_files(folder).items() if path != MANIFEST}
    raw = {
        "format": 1,
        "name": name,
        "version": version,
        "license": license,
        "modalities": {key: dict(value) for key, value in modalities.items()},
        "files": {path: {"size": entry.size, "sha256": entry.sha256} for path, entry in sorted(files.items())},
        "sha256": hash_whole(files),
    }
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        raise PackageError(f"not a valid manifest: {error}", where=str(folder / MANIFEST)) from error
    package = _checked(folder, manifest, files)
    temporary = folder / f".{MANIFEST}.{os.getpid()}"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(raw, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / MANIFEST)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    return package
