"""Files of a bundle on disk: listed without following links, hashed, written durably. Standard library only."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from runtimes.manifest import BundleError, FileInfo, UnsafeBundlePath

CHUNK = 1 << 20
PLAIN_ONLY = "A bundle holds plain files only: remove it, or fetch the bundle again."
# Called with the name of a stage and the bytes it has just dealt with (0 at its start).
Progress = Callable[[str, int], None]
_WAYS_OUT = {
    errno.ENOSPC: "Free some space, or choose an output on another disk.",
    errno.EDQUOT: "The disk quota is used up; free some space, or choose another output.",
    errno.EFBIG: "The file-size limit is reached; raise it (ulimit -f), or choose another file system.",
    errno.EROFS: "The file system is read-only; choose an output elsewhere.",
    errno.EACCES: "Permission is missing; choose a folder that you may write to.",
    errno.EPERM: "Permission is missing; choose a folder that you may write to.",
    errno.EIO: "The disk reports a fault; check it, and choose an output on another one.",
    errno.ENAMETOOLONG: "The name is too long; choose a shorter output path.",
    errno.EBUSY: "The folder is in use, or a mount point; choose another output.",
    errno.EXDEV: "The path crosses into another file system; choose an output that does not.",
    errno.ENOTDIR: "A part of the path is not a folder; choose another output.",
}


def quiet(stage: str, size: int) -> None:
    """The Progress that shows nothing."""


def storage_error(error: OSError, path: Path) -> BundleError | None:
    """The BundleError for a fault of the disk or its rights, naming the file; None for any other OSError."""
    way_out = _WAYS_OUT.get(error.errno or 0)
    if way_out is None:
        return None
    where = error.filename if isinstance(error.filename, str) else path
    return BundleError(os.strerror(error.errno or 0), str(where), way_out)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns the OSErrors of its body into BundleErrors that name the file (`path` where the system names none)."""
    try:
        yield
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else path
        fault = storage_error(error, path)
        raise fault or BundleError(error.strerror or str(error), str(where), "Check that path.") from error


def scan(folder: Path) -> dict[str, int]:
    """Relative path -> size of every file below `folder`, sorted. Links and special files are refused by name."""
    found: dict[str, int] = {}

    def visit(directory: Path, prefix: str) -> None:
        with os.scandir(directory) as entries:
            for entry in entries:
                path, info = prefix + entry.name, entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(info.st_mode):
                    visit(directory / entry.name, path + "/")
                elif stat.S_ISREG(info.st_mode):
                    found[path] = info.st_size
                else:
                    kind = "a link" if stat.S_ISLNK(info.st_mode) else "not a plain file"
                    raise UnsafeBundlePath(f"is {kind}", str(folder / path), PLAIN_ONLY)

    visit(folder, "")
    return dict(sorted(found.items()))


def open_plain(path: Path) -> int:
    """A read-only descriptor of a plain file; UnsafeBundlePath for a link, FIFO or device (never blocks on one)."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafeBundlePath("is a link", str(path), PLAIN_ONLY) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnsafeBundlePath("is not a plain file", str(path), PLAIN_ONLY)
    return descriptor


def hash_file(path: Path, progress: Progress = quiet) -> FileInfo:
    """Size in bytes and SHA-256 of what a plain file holds; constant memory."""
    digest, size = hashlib.sha256(), 0
    with open(open_plain(path), "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
            progress("hash", len(chunk))
    return FileInfo(size, digest.hexdigest())


def sync(path: Path) -> None:
    """fsync of one file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path, progress: Progress = quiet) -> None:
    """fsync of every file below `folder`, then of its folders from the deepest up."""
    for path, size in scan(folder).items():
        sync(folder / path)
        progress("sync", size)
    for directory, _, _ in os.walk(folder, topdown=False):
        sync(Path(directory))


def half_written(path: PurePath) -> PurePath:
    """What lies beside `path` while `write_durably` writes it, and stays when the process is killed meanwhile."""
    return path.with_name(f".{path.name}.new")


def write_durably(path: Path, data: bytes) -> None:
    """`path` holds the old or the new bytes at every instant, and the new ones for good on return."""
    temporary = Path(half_written(path))
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)
