"""A secret of this machine, by which it knows what it wrote itself. Standard library only.

What lies in a bundle may come from anywhere; what is sealed with this key was written here, by a user who can read it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from runtimes.files import open_plain, storage_errors, sync
from runtimes.manifest import BundleError

KEY_BYTES = 32


def state_folder() -> Path:
    """Where this user's state lies: below $XDG_STATE_HOME, or ~/.local/state (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "edge-export"


def key_path() -> Path:
    """The key: 32 random bytes, which nobody but their owner can read."""
    return state_folder() / "engine.key"


def seal(content: bytes) -> str:
    """HMAC-SHA256 of the content, as hexadecimal digits; makes the key where there is none that can be used.

    Raises BundleError when the disk refuses.
    """
    key = _read()
    if key is None:
        _make()
        key = _read()
    if key is None:
        raise BundleError("cannot be read after it was written", str(key_path()), "Check who owns that file.")
    return _code(key, content)


def is_sealed(content: bytes, code: str) -> bool:
    """Whether ``code`` is this machine's seal of the content. Makes no key."""
    key = _read()
    return key is not None and hmac.compare_digest(_code(key, content).encode(), code.encode(errors="replace"))


def _code(key: bytes, content: bytes) -> str:
    return hmac.new(key, content, hashlib.sha256).hexdigest()


def _read() -> bytes | None:
    """The key; None for none, for a broken one, and for one that others could have read or written."""
    try:
        descriptor = open_plain(key_path())
    except (OSError, BundleError):
        return None
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        # Windows says by other means who may read a file, and keeps a user's folder to the user.
        private = os.name == "nt" or (found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o077)
        key = file.read(KEY_BYTES + 1)
    return key if private and len(key) == KEY_BYTES else None


def _make() -> None:
    """Puts a new key in the place of none, or of one that `_read` does not take: whole, or not at all."""
    path = key_path()
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(secrets.token_bytes(KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            if os.path.lexists(path) and _read() is None:
                os.replace(temporary, path)
            else:
                with suppress(FileExistsError):  # another process made one first: it is the machine's
                    os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)
