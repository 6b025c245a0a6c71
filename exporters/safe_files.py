"""Reading a folder that somebody else wrote: safe paths, regular files, hashes.

Everything here is bounded: in the number of files, in bytes read and in time.
"""

from __future__ import annotations

import hashlib
import os
import stat
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from exporters.errors import ConfigError, PackageError, UnsafePath, WeightsError
from exporters.progress import Bytes, ignore

MAX_FILES = 10_000
_CHUNK = 1 << 20
_LFS_LARGEST = 1024
_LFS_MARK = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (lower-case hexadecimal) of one file."""

    size: int
    sha256: str


def check_relative(path: str, where: str) -> str:
    """Return `path` if it is a plain relative POSIX path below its folder, else raise UnsafePath."""
    parts = PurePosixPath(path).parts
    if (
        not path
        or len(path) > 512
        or "\\" in path
        or not path.isprintable()
        or ":" in path
        or PurePosixPath(path).is_absolute()
        or ".." in parts
        or str(PurePosixPath(path)) != path
    ):
        raise UnsafePath(
            f"the path {path[:200]!r} is not a plain path below the folder",
            where=where,
            way_out="Write it relative, with forward slashes, without '..', '.', drive letters or control characters",
        )
    return path


def _entries(folder: Path, top: Path, found: dict[str, os.stat_result]) -> None:
    try:
        entries = sorted(os.scandir(folder), key=lambda item: item.name)
    except OSError as error:
        raise PackageError(f"cannot be read ({error.strerror})", where=str(folder), way_out="Allow it") from error
    for entry in entries:
        path = Path(entry.path)
        name = path.relative_to(top).as_posix()
        check_relative(name, str(top))
        status = entry.stat(follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            _entries(path, top, found)
        else:
            found[name] = status
        if len(found) > MAX_FILES:
            raise PackageError(f"more than {MAX_FILES} files", where=str(top), way_out="Point at the package itself")


def check_regular(status: os.stat_result, path: Path, links_inside: int = 1) -> None:
    """Refuse whatever is not a plain file of this folder alone: link, FIFO, device, socket, outside hard link."""
    if stat.S_ISLNK(status.st_mode):
        raise UnsafePath(
            f"is a symbolic link to {os.readlink(path)!r}",
            where=str(path),
            way_out="Copy the package with its links followed (cp -rL)",
        )
    if not stat.S_ISREG(status.st_mode):
        raise UnsafePath("is not a regular file", where=str(path), way_out="Remove it from the package")
    if status.st_nlink > links_inside:
        raise UnsafePath(
            f"is hard-linked from outside this folder ({status.st_nlink} names, {links_inside} here)",
            where=str(path),
            way_out="Copy the package (cp -r), so that nothing outside can change it",
        )


def list_files(folder: Path) -> dict[str, Path]:
    """All files below `folder` by relative POSIX path, in sorted order.

    Raises UnsafePath for links, special files and names that differ only in case; PackageError past MAX_FILES.
    """
    found: dict[str, os.stat_result] = {}
    _entries(folder, folder, found)
    names_of: dict[tuple[int, int], int] = {}
    for status in found.values():
        names_of[status.st_dev, status.st_ino] = names_of.get((status.st_dev, status.st_ino), 0) + 1
    folded: dict[str, str] = {}
    for name, status in sorted(found.items()):
        check_regular(status, folder / name, names_of[status.st_dev, status.st_ino])
        other = folded.setdefault(unicodedata.normalize("NFC", name.casefold()), name)
        if other != name:
            raise UnsafePath(
                f"{other!r} and {name!r} differ only in case",
                where=str(folder),
                way_out="Rename one: many file systems hold only one of them",
            )
    return {name: folder / name for name in sorted(found)}


def hash_file(path: Path, progress: Bytes = ignore) -> FileEntry:
    """Size and SHA-256 of a regular file, read once in chunks.

    Opened without following a link and without blocking on a FIFO.
    """
    digest = hashlib.sha256()
    size = 0
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise PackageError(f"cannot be read ({error.strerror})", where=str(path), way_out="Fetch it again") from error
    with os.fdopen(handle, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise UnsafePath("is not a regular file", where=str(path), way_out="Remove it from the package")
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
            progress(len(chunk))
    return FileEntry(size, digest.hexdigest())


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that a rename in it survives a crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hash_whole(files: Mapping[str, FileEntry]) -> str:
    """SHA-256 over the sorted lines ``path TAB size TAB sha256 NEWLINE``."""
    lines = (f"{path}\t{entry.size}\t{entry.sha256}\n" for path, entry in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def refuse_lfs_pointer(path: Path) -> None:
    """Refuse the small text file that Git LFS leaves where the file itself should be."""
    if path.stat().st_size > _LFS_LARGEST:
        return
    with path.open("rb") as file:
        if file.read(len(_LFS_MARK)) == _LFS_MARK:
            raise WeightsError(
                "is a Git LFS pointer, not the file itself", where=str(path), way_out="Run `git lfs pull` in its clone"
            )


def read_bytes(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; raises ConfigError when it is larger or missing."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror})", where=str(path), way_out="Add the file") from error
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise UnsafePath("is not a regular file", where=str(path), way_out="Remove it from the package")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ConfigError(
            f"is larger than {limit} bytes", where=str(path), way_out="This is not the file expected here"
        )
    return data
