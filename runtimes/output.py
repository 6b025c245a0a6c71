"""Output files: refused before any work when they cannot be written, and written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from runtimes.errors import Fault
from runtimes.files import storage_error, write_durably

#: The way out of an EmptyOutput.
DECODED = "Look at the report's gates of this artifact, or choose the exact mode"


class OutputError(Fault):
    """The output file cannot be written."""


class EmptyOutput(Fault):
    """A signal that carries nothing: constant, silent, or not finite."""


def check_writable(path: Path) -> None:
    """Raises OutputError unless a file can be made at `path`. Leaves an existing file as it is."""
    if path.is_dir():
        raise OutputError("is a folder", str(path), "Give the name of a file")
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        # The replacement is a rename: it would take away the link or the device itself.
        raise OutputError("is a link, a device or another special file", str(path), "Give the name of a plain file")
    if not path.parent.is_dir():
        raise OutputError("its folder does not exist", str(path), f"Create {path.parent} first")
    try:
        # The replacement is a rename, so the folder is what has to be writable.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:64]}."):
            return
    except OSError as error:
        raise _output_error(error, path) from error


def write_output(path: Path, data: bytes) -> None:
    """Replaces `path` by `data` in one step. Raises OutputError; the old file then stays."""
    try:
        write_durably(path, data)
    except OSError as error:
        raise _output_error(error, path) from error


def _output_error(error: OSError, path: Path) -> OutputError:
    known = storage_error(error, path)
    return (
        OutputError(known.what, known.where, known.way_out)
        if known
        else OutputError(os.strerror(error.errno or 0), str(path), "Choose another output")
    )
