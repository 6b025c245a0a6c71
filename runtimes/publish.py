"""Puts a finished bundle folder in its place so that a crash leaves the old bundle or the new, never a mix.

The crash rule: build in a sibling temporary folder; sync files; hash; write the manifest last; sync the folder;
rename; sync the parent. A folder cannot be renamed over one that holds files, so an existing bundle is exchanged with
the new one in a single step (Linux renameat2, RENAME_EXCHANGE). Where the system has no such call there are two
renames, the old bundle aside and the new one in; a crash between them leaves `.NAME.old` beside the output, and
the next open or build puts it back.

While a builder works it holds a lock on `.NAME.lock`. Whatever other temporary folders of that output are there
under the lock belong to builders that died, and are removed.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtimes.files import Progress, quiet, storage_error, storage_errors, sync, sync_tree
from runtimes.manifest import MANIFEST, BundleError, parse_version

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# What native writers (safetensors, protobuf, ONNX Runtime) say when a write fails, for they raise no OSError.
_DISK_FULL = re.compile(r"no space left on device|os error 28\b|disk quota exceeded|file too large", re.IGNORECASE)


class BundleBusy(BundleError):
    """Another builder is at work on the same output."""


def _beside(output: Path, suffix: str) -> Path:
    return output.with_name(f".{output.name}.{suffix}")


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Holds the output's lock; BundleBusy, naming the holder's pid, when another process has it."""
    import fcntl

    path = _beside(output, "lock")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            way_out = "Wait until it ends, or choose another output."
            raise BundleBusy(f"process {holder} is building there", str(output), way_out) from error
        # The last holder removes the file; a lock on a file that is gone protects nothing, so take it again.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Removes a folder, read-only subfolders included."""
    for directory, _, _ in os.walk(folder):
        with suppress(OSError):  # not ours to chmod: then rmtree says so
            os.chmod(directory, 0o700)
    shutil.rmtree(folder)


def _discard(folder: Path, output: Path) -> None:
    """Removes `.NAME.old`. It takes a temporary name first: what is called old is always whole, never half removed."""
    temporary = _temporary(output)
    os.rename(folder, temporary)
    _remove(temporary)


def _temporary(output: Path) -> Path:
    return _beside(output, f"tmp-{os.getpid()}-{secrets.token_hex(4)}")


def _clean(output: Path) -> None:
    """Under the lock: puts back or removes what builders left that died."""
    old = _beside(output, "old")
    if old.is_dir():
        if output.exists():
            _discard(old, output)
        else:
            os.rename(old, output)
            sync(output.parent)
    temporary = re.compile(re.escape(f".{output.name}.tmp-") + r"\d+-[0-9a-f]{8}")
    for entry in os.scandir(output.parent):
        if temporary.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            _remove(Path(entry.path))


def _exchange(new: Path, output: Path) -> bool:
    """Swaps two folders in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(output), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(output))


def recover(output: str | os.PathLike[str]) -> None:
    """Puts the old bundle back when a crash fell between the two renames of a system without an exchange."""
    path = Path(os.path.realpath(output))
    with storage_errors(path):
        if not path.exists() and _beside(path, "old").is_dir():
            with _locked(path):
                _clean(path)


def _swap(new: Path, output: Path, progress: Progress, exchange: bool) -> None:
    """`new` becomes `output`; what was there is removed afterwards."""
    old = _beside(output, "old")
    progress("rename", 0)
    if not output.exists():
        os.rename(new, output)
    elif exchange and _exchange(new, output):
        old = new
    else:
        if old.exists():
            _discard(old, output)
        os.rename(output, old)
        progress("aside", 0)
        os.rename(new, output)
    progress("renamed", 0)
    sync(output.parent)
    # The new bundle is in place for good: what cannot be removed now, the next build removes.
    with suppress(OSError):
        if old.exists():
            _discard(old, output)
    progress("done", 0)


def _identity(folder: Path) -> tuple[str, str] | None:
    """(student, version) of a bundle, read loosely: what is there may be older or damaged. None if it has neither."""
    try:
        student = json.loads((folder / MANIFEST).read_bytes())["student"]
        return str(student["name"]), str(student["version"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _check_target(output: Path, new: Path | None, allow_downgrade: bool) -> None:
    """Refuses an output that is something else than a bundle, and an older version over a newer one."""
    if not output.exists():
        return
    if os.path.ismount(output):
        raise BundleError("is a mount point, which nothing can replace", str(output), "Choose a folder below it.")
    if not output.is_dir() or (any(output.iterdir()) and not (output / MANIFEST).is_file()):
        way_out = "Choose another output, or remove it yourself."
        raise BundleError("is there already and is not a bundle", str(output), way_out)
    before, after = _identity(output), _identity(new) if new else None
    if allow_downgrade or before is None or after is None or before[0] != after[0]:
        return
    if parse_version(after[1]) < parse_version(before[1]):
        way_out = "Allow the downgrade (--allow-downgrade), or choose another output."
        raise BundleError(f"holds {before[0]} {before[1]}, newer than {after[1]}", str(output), way_out)


@contextmanager
def staged(
    output: str | os.PathLike[str], *, allow_downgrade: bool = False, progress: Progress = quiet, exchange: bool = True
) -> Iterator[Path]:
    """Gives an empty folder beside `output` to build in, and publishes it when the block ends without an error.

    The block writes its files and calls `runtimes.bundle.write_manifest` last. Any error removes the folder and leaves
    what was at `output` as it was; a full disk, a missing right or a faulty disk comes out as BundleError.
    `exchange=False` takes the two renames even where the system can exchange folders.
    """
    target = Path(os.path.realpath(output))
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        progress("lock", 0)
    with _storage_or_same(target), _locked(target):
        _clean(target)
        _check_target(target, None, allow_downgrade)
        folder = _temporary(target)
        folder.mkdir()
        try:
            progress("build", 0)
            yield folder
            if not (folder / MANIFEST).is_file():
                way_out = "Call runtimes.bundle.write_manifest before the block ends."
                raise BundleError(f"the builder wrote no {MANIFEST}", str(output), way_out)
            _check_target(target, folder, allow_downgrade)
            progress("sync", 0)
            sync_tree(folder, progress)
            _swap(folder, target, progress, exchange)
        finally:
            # After an exchange this is the old bundle, already removed; otherwise it is what the error left.
            if folder.exists():
                _remove(folder)


@contextmanager
def _storage_or_same(target: Path) -> Iterator[None]:
    """Turns faults of the disk into BundleError, whoever raised them, and lets every other error through."""
    try:
        yield
    except BundleError:
        raise
    except OSError as error:
        # A fault elsewhere (an input that may not be read) is not about this output.
        elsewhere = isinstance(error.filename, str) and not Path(error.filename).is_relative_to(target.parent)
        if not elsewhere and (found := storage_error(error, target)) is not None:
            raise found from error
        raise
    except Exception as error:
        if _DISK_FULL.search(str(error)):
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
            raise storage_error(full, target) or error from error
        raise
