"""A bundle as one file: a plain, deterministic .tar with the manifest first.

    python -m runtimes.archive pack BUNDLE FILE.tar
    python -m runtimes.archive unpack FILE.tar OUTPUT

The archive is not compressed (quantised weights do not get smaller), so it cannot unpack to more than its own size.
Only plain files that the manifest names, each hashed on the way, and its signature are taken out of it; links, devices,
sparse files, extended headers and paths that leave the folder are refused before anything is written for them. The
output appears by the crash rule, whole or not at all.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from runtimes.bundle import Bundle, load_bundle
from runtimes.errors import Fault
from runtimes.files import CHUNK, Progress, open_plain, quiet, scan, storage_errors, sync, write_durably
from runtimes.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_SIGNATURE_BYTES,
    SIGNATURE,
    BundleError,
    FileInfo,
    Manifest,
    UnsafeBundlePath,
    safe_path,
)
from runtimes.manifest_json import parse_manifest
from runtimes.publish import staged
from runtimes.strict_json import load_json

MAX_MUTABLE_BYTES = 64 << 20
_USTAR_LARGEST = (1 << 33) - 1
AGAIN = "Fetch the archive again, or pack the bundle again."


def pack(bundle: str | os.PathLike[str], archive: str | os.PathLike[str], progress: Progress = quiet) -> None:
    """Verifies a bundle and writes it as one file; equal bundles give equal bytes. Replaces `archive` in one step."""
    opened, target = load_bundle(bundle), Path(archive)
    opened.verify(progress)
    temporary = target.with_name(f".{target.name}.new")
    with storage_errors(target):
        try:
            with open(temporary, "wb") as file:
                for path in sorted(scan(opened.folder), key=lambda path: (path != MANIFEST, path)):
                    _write_member(file, opened.folder / path, path, progress)
                file.write(bytes(2 * tarfile.BLOCKSIZE))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _write_member(file: BinaryIO, source: Path, path: str, progress: Progress) -> None:
    with open(open_plain(source), "rb") as data:
        info = tarfile.TarInfo(path)
        info.size = os.fstat(data.fileno()).st_size
        try:
            # Plain headers where they do; only the other format can say a size of 8 GiB or more.
            large = info.size > _USTAR_LARGEST
            header = info.tobuf(tarfile.GNU_FORMAT if large else tarfile.USTAR_FORMAT, "utf-8", "strict")
        except ValueError as error:
            raise BundleError(f"does not fit a tar header: {error}", str(source), "Give it a shorter name.") from error
        file.write(header)
        shutil.copyfileobj(data, file, CHUNK)
        file.write(bytes(-info.size % tarfile.BLOCKSIZE))
        progress("pack", info.size)


def unpack(
    archive: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    allow_downgrade: bool = False,
    progress: Progress = quiet,
) -> Bundle:
    """Takes a bundle out of its archive and publishes it at `output`.

    Raises BundleError, or UnsafeBundlePath for a member that is not a plain file inside the bundle.
    """
    source = Path(archive)
    with storage_errors(source), open(open_plain(source), "rb") as file:
        members = _members(file, source)
        text = _manifest_text(members, file, source)
        manifest = parse_manifest(load_json(text, f"{source}: {MANIFEST}"))
        _check_room(manifest, source, Path(output))
        with staged(output, allow_downgrade=allow_downgrade, progress=progress) as folder:
            _take_files(members, file, manifest, folder, source, progress)
            write_durably(folder / MANIFEST, text)
    return load_bundle(output)


def _members(file: BinaryIO, source: Path) -> Iterator[tuple[str, int]]:
    """(path, size) of each member, with the file at its data. The caller reads that data before the next step."""
    while block := file.read(tarfile.BLOCKSIZE):
        if not any(block):
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            what = f"is not a plain tar archive ({error}); compressed ones are not taken"
            raise BundleError(what, str(source), AGAIN) from error
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            what = f"member {info.name!r} is not a plain file (type {info.type.decode('ascii', 'replace')!r})"
            raise UnsafeBundlePath(what, str(source), AGAIN)
        end = file.tell() + info.size + -info.size % tarfile.BLOCKSIZE
        if info.size < 0 or end > os.fstat(file.fileno()).st_size:
            raise BundleError(f"ends inside member {info.name!r}", str(source), AGAIN)
        yield safe_path(info.name, str(source)), info.size
        file.seek(end)
    raise BundleError("ends without an end mark", str(source), AGAIN)


def _manifest_text(members: Iterator[tuple[str, int]], file: BinaryIO, source: Path) -> bytes:
    first = next(members, None)
    if first is None or first[0] != MANIFEST:
        raise BundleError(f"does not begin with {MANIFEST}, so it is not a bundle archive", str(source), AGAIN)
    if first[1] > MAX_MANIFEST_BYTES:
        raise BundleError(f"{MANIFEST} is larger than {MAX_MANIFEST_BYTES} bytes", str(source), AGAIN)
    return file.read(first[1])


def _check_room(manifest: Manifest, source: Path, output: Path) -> None:
    """Refuses early what the manifest says cannot be there, or cannot fit."""
    total = sum(info.size for info in manifest.files.values())
    if total > source.stat().st_size:
        raise BundleError(f"names {total} bytes of files, more than the archive has", str(source), AGAIN)
    parent = next(folder for folder in Path(os.path.realpath(output)).parents if folder.is_dir())
    if total > (free := shutil.disk_usage(parent).free):
        way_out = "Free some space, or choose an output on another disk."
        raise BundleError(f"needs {total} bytes, and only {free} are free", str(parent), way_out)


def _take_files(
    members: Iterator[tuple[str, int]],
    file: BinaryIO,
    manifest: Manifest,
    folder: Path,
    source: Path,
    progress: Progress,
) -> None:
    taken: set[str] = set()
    for path, size in members:
        expected = manifest.files.get(path)
        if path in taken or path == MANIFEST:
            raise BundleError(f"holds {path!r} twice", str(source), AGAIN)
        if expected is None and path not in manifest.mutable and path != SIGNATURE:
            raise BundleError(f"holds {path!r}, which is not in the manifest", str(source), AGAIN)
        largest = MAX_SIGNATURE_BYTES if path == SIGNATURE else MAX_MUTABLE_BYTES
        if expected.size != size if expected else size > largest:
            raise BundleError(f"member {path!r} has {size} bytes, not what the manifest says", str(source), AGAIN)
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if _copy(file, folder / path, size, progress) != expected and expected is not None:
            raise BundleError(f"member {path!r} does not have the manifest's SHA-256", str(source), AGAIN)
        taken.add(path)
    missing = sorted(set(manifest.files) - taken)
    if missing:
        raise BundleError(f"{missing[0]!r} is missing", str(source), AGAIN)


def _copy(file: BinaryIO, target: Path, size: int, progress: Progress) -> FileInfo:
    digest, left = hashlib.sha256(), size
    with open(target, "xb") as out:
        while left and (chunk := file.read(min(CHUNK, left))):
            out.write(chunk)
            digest.update(chunk)
            left -= len(chunk)
            progress("unpack", len(chunk))
    return FileInfo(size - left, digest.hexdigest())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m runtimes.archive", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write a bundle as one file")
    packing.add_argument("bundle", type=Path)
    packing.add_argument("archive", type=Path)
    unpacking = commands.add_parser("unpack", help="take a bundle out of its archive")
    unpacking.add_argument("archive", type=Path)
    unpacking.add_argument("output", type=Path)
    unpacking.add_argument("--allow-downgrade", action="store_true", help="replace a newer version of the student")
    given = parser.parse_args(arguments)
    try:
        if given.command == "pack":
            pack(given.bundle, given.archive)
        else:
            unpack(given.archive, given.output, allow_downgrade=given.allow_downgrade)
    except Fault as fault:
        print(fault, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
