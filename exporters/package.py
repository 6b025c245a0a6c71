"""The delivery package on disk: schema, validator and writer.

Layout (one atomic unit; every file but package.json is listed in it with size and SHA-256)::

    config.json  generation_config.json
    model-00001-of-0000N.safetensors ...  model.safetensors.index.json
    tokenizer/{tokenizer.json,tokenizer_config.json,special_tokens_map.json,added_tokens.json}
    discretizers/<modality>/{config.json, model.safetensors | model.pth}
    samples/{lm,images,audio}.safetensors, samples/tokenizer_golden.json (optional)  quality.json (optional)
    MODEL_CARD.md  DATA_CARD.md
    package.json

`package.json` is `exporters.package_schema.Manifest`; its `model_json_schema()` is the JSON schema. Token ranges are
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
from typing import Any

from exporters.errors import PackageError
from exporters.modality_table import Modality, modality_table
from exporters.package_schema import MANIFEST, FileModel, Manifest, parse_manifest
from exporters.progress import Bytes, ignore
from exporters.remote_code import refuse_remote_code
from exporters.safe_files import (
    FileEntry,
    check_regular,
    check_relative,
    hash_file,
    hash_whole,
    list_files,
    refuse_lfs_pointer,
    sync_folder,
)
from exporters.strict_json import read_json

PLAIN_FILES = re.compile(
    r"config\.json|generation_config\.json|model[^/]*\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
)
_REQUIRED = (
    "config.json",
    "generation_config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "MODEL_CARD.md",
    "DATA_CARD.md",
)


@dataclass(frozen=True)
class Package:
    """A validated package: what package.json says, with every file checked against it.

    Attributes:
        files: size and hash of every file but package.json (of the files read, for a plain folder).
        plain: a transformers folder without package.json.
        config: config.json, parsed.
    """

    folder: Path
    name: str
    version: str
    license: str
    modalities: Mapping[str, Modality]
    files: Mapping[str, FileEntry]
    sha256: str
    plain: bool
    config: Mapping[str, Any] = field(repr=False)

    def path(self, name: str) -> Path | None:
        """The path of a listed file, or None when the package has no such file."""
        return self.folder / name if name in self.files else None

    @property
    def tokenizer_prefix(self) -> str:
        """Where the tokenizer files lie, relative to the folder."""
        return "" if self.plain else "tokenizer/"


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


def _check_hashes(found: Mapping[str, Path], listed: Mapping[str, FileModel], progress: Bytes) -> dict[str, FileEntry]:
    entries = {}
    for name, wanted in sorted(listed.items()):
        # The size is compared first so that a file that grew without bound is never read.
        refuse_lfs_pointer(found[name])
        size = found[name].stat().st_size
        entry = hash_file(found[name], progress) if size == wanted.size else FileEntry(size, "")
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


def _read_config(folder: Path, prefix: str, files: Mapping[str, Any]) -> dict[str, Any]:
    """config.json, once neither it nor the files beside it ask to run code."""
    for name in ("config.json", "generation_config.json", f"{prefix}tokenizer_config.json"):
        if name in files:
            refuse_remote_code(read_json(folder / name), name)
    return read_json(folder / "config.json")


def _vocab_size(config: Mapping[str, Any], where: str) -> int:
    size = config.get("vocab_size")
    if isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= 1 << 24:
        raise PackageError(f"vocab_size is {size!r}", where=where, way_out="Give a positive whole number")
    return size


def _validate_plain(folder: Path, progress: Bytes) -> Package:
    names = {path.name: path for path in sorted(folder.iterdir()) if PLAIN_FILES.fullmatch(path.name)}
    if "config.json" not in names:
        raise PackageError(
            "has neither package.json nor config.json",
            where=str(folder),
            way_out="Point at a delivery package or a transformers checkpoint folder",
        )
    for path in names.values():
        check_regular(path.lstat(), path)
        refuse_lfs_pointer(path)
    files = {name: hash_file(path, progress) for name, path in names.items()}
    config = _read_config(folder, "", files)
    size = _vocab_size(config, "config.json")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._") or "student"
    text = {"text": Modality("text", 0, size)}
    return Package(folder, name, "0.0.0", "unknown", text, files, hash_whole(files), True, config)


def validate(folder: str | Path, progress: Bytes = ignore) -> Package:
    """Check a delivery package, or a plain transformers folder, without importing torch.

    Every file is hashed once, and `progress` called with the bytes. Weights are not opened here:
    `exporters.student.load_student` does that.

    Raises PackageError (UnsafePath, ConfigError, ...) naming the file or field.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PackageError("is not a folder", where=str(folder), way_out="Point at a delivery package")
    if not os.path.lexists(folder / MANIFEST):
        return _validate_plain(folder, progress)
    found = list_files(folder)
    manifest = parse_manifest(read_json(folder / MANIFEST), str(folder / MANIFEST))
    _check_listing(folder, manifest.files, found)
    files = _check_hashes(found, manifest.files, progress)
    if hash_whole(files) != manifest.sha256:
        raise PackageError("sha256 is not that of its list of files", where=MANIFEST, way_out="Fetch the package again")
    return _checked(folder, manifest, files)


def _checked(folder: Path, manifest: Manifest, files: Mapping[str, FileEntry]) -> Package:
    if missing := [name for name in _REQUIRED if name not in files]:
        raise PackageError(f"{', '.join(missing)} missing", where=str(folder), way_out="Add what the format asks for")
    _check_versions(folder, manifest.version, files)
    config = _read_config(folder, "tokenizer/", files)
    size = _vocab_size(config, "config.json")
    modalities = modality_table(folder, manifest.modalities, size, files)
    return Package(
        folder, manifest.name, manifest.version, manifest.license, modalities, files, manifest.sha256, False, config
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
    manifest = parse_manifest(raw, str(folder / MANIFEST))
    package = _checked(folder, manifest, files)
    temporary = folder / f".{MANIFEST}.{os.getpid()}"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(raw, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / MANIFEST)
    sync_folder(folder)
    return package
