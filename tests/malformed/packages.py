"""Damaged copies of the tiny student: copy it, change one thing, list the hashes again, see it refused."""

from __future__ import annotations

import json
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exporters.errors import ExportError
from exporters.package_schema import MANIFEST
from exporters.safe_files import hash_file, hash_whole
from exporters.student import Student, load_student
from tests.refusals import raises

GROWTH_KB = 300 << 10  # no refusal may cost more memory than this


def copy_package(source: Path, target: Path) -> Path:
    """A copy that may be changed."""
    shutil.copytree(source, target)
    return target


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def relist(folder: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> Path:
    """Write package.json again for the files as they are now, unchecked, so that the damage itself is met."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    files = {path.relative_to(folder).as_posix(): hash_file(path) for path in paths}
    manifest["files"] = {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in files.items()}
    manifest["sha256"] = hash_whole(files)
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def refused(kind: type[ExportError], *words: str, action: Callable[[], object]) -> ExportError:
    """`action` raises exactly this kind of error; it names all `words` and a way out, in bounded memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with raises(ExportError) as caught:
        action()
    error = caught.value
    assert type(error) is kind, f"{type(error).__name__}: {error}"
    for word in words:
        assert word in str(error), str(error)
    assert error.where, "names no place"
    assert error.way_out, "names no way out"
    assert len(str(error)) < 1500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH_KB
    return error


def load_refused(folder: Path, kind: type[ExportError], *words: str) -> ExportError:
    """`load_student(folder)` is refused; see `refused`."""
    return refused(kind, *words, action=lambda: load_student(folder))


def loads(folder: Path) -> Student:
    """The student, which must load."""
    return load_student(folder)


def read_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file, without any check."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_safetensors(path: Path, header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> None:
    """Write a safetensors file as told, right or wrong."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
