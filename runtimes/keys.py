"""Ed25519 keys that sign bundles: made, and read from PEM files (PKCS #8 and SubjectPublicKeyInfo).

The files are those that `openssl genpkey -algorithm ed25519` and `openssl pkey -pubout` write, so keys may come from
there too. Needs the `cryptography` package (extra `sign`), which loads inside the functions that use it.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from runtimes.files import open_plain, storage_errors, sync
from runtimes.manifest import BundleError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

MAX_KEY_BYTES = 16 << 10
MAX_TRUSTED_KEYS = 1000
MAKE_KEY = "Give an Ed25519 key in PEM form, as `python -m runtimes.signing keygen KEY` makes it."


class KeyFileError(BundleError):
    """A key file, or a place of trusted keys, cannot be used."""


@dataclass(frozen=True)
class PublicKey:
    """An Ed25519 public key (32 bytes) and where it was read."""

    raw: bytes
    source: str = ""

    @property
    def fingerprint(self) -> str:
        """The first 128 bits of the key's SHA-256: for people to compare; the code compares whole keys."""
        return f"sha256:{sha256(self.raw).hexdigest()[:32]}"

    def __str__(self) -> str:
        return f"{self.fingerprint} ({self.source})" if self.source else self.fingerprint

    def signed(self, signature: bytes, data: bytes) -> bool:
        """Whether `signature` (64 bytes) over `data` was made with this key."""
        _need_cryptography()
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, data)
        except (InvalidSignature, ValueError):  # ValueError: 32 bytes that are not a point of the curve
            return False
        return True


def trusted_keys(place: Path) -> tuple[PublicKey, ...]:
    """The public key in a file, or those in a folder's *.pub files. Raises KeyFileError; never gives an empty tuple."""
    with storage_errors(place):
        if not stat.S_ISDIR(os.stat(place).st_mode):
            return (load_public_key(place),)
        files = sorted(path for path in place.iterdir() if path.suffix == ".pub")
    if not 0 < len(files) <= MAX_TRUSTED_KEYS:
        what = f"holds {len(files)} files named *.pub, not 1 to {MAX_TRUSTED_KEYS}"
        raise KeyFileError(what, str(place), "Put the public keys that you trust there, or name one of them.")
    return tuple(load_public_key(path) for path in files)


def load_public_key(path: Path) -> PublicKey:
    """An Ed25519 public key from its PEM file. Raises KeyFileError."""
    _need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    data = _key_bytes(path)
    if b"PRIVATE KEY-----" in data:
        raise KeyFileError("is a private key, which belongs on no device", str(path), f"Give {path.name}.pub instead.")
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyFileError("is not a public key in PEM form", str(path), MAKE_KEY) from error
    if not isinstance(key, Ed25519PublicKey):
        raise KeyFileError(f"is another kind of key ({type(key).__name__})", str(path), MAKE_KEY)
    return PublicKey(key.public_bytes_raw(), path.name)


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """An Ed25519 private key from its PEM file. Raises KeyFileError."""
    _need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _key_bytes(path)
    if b"PUBLIC KEY-----" in data:
        raise KeyFileError("is a public key", str(path), "Give the private key of the pair: the file without .pub.")
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError as error:  # how the package says that it needs a password
        way_out = "Decrypt it first: openssl pkey -in KEY -out PLAIN (with umask 077)."
        raise KeyFileError("is encrypted", str(path), way_out) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyFileError("is not a private key in PEM form", str(path), MAKE_KEY) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"is another kind of key ({type(key).__name__})", str(path), MAKE_KEY)
    return key


def make_keys(path: Path) -> PublicKey:
    """Writes a new private key to `path` (mode 600) and its public key to `path`.pub. Never replaces a file."""
    _need_cryptography()
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key, public = Ed25519PrivateKey.generate(), Path(f"{path}.pub")
    secret = key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    shown = key.public_key().public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)
    with storage_errors(path):
        _write_new(path, secret, 0o600)
        try:
            _write_new(public, shown, 0o644)
        except BaseException:
            path.unlink()  # made a moment ago, and nobody has its public half
            raise
        sync(path.parent)
    return PublicKey(key.public_key().public_bytes_raw(), public.name)


def _need_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ModuleNotFoundError as error:
        raise KeyFileError("cryptography is not installed", "signatures", "pip install 'edge-export[sign]'") from error


def _key_bytes(path: Path) -> bytes:
    # A link is fine here: the operator chose the place, and mounted secrets are links.
    with storage_errors(path):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise KeyFileError("is not a plain file", str(path), MAKE_KEY)
        with open(open_plain(Path(os.path.realpath(path))), "rb") as file:
            data = file.read(MAX_KEY_BYTES + 1)
    if len(data) > MAX_KEY_BYTES:
        raise KeyFileError(f"is larger than {MAX_KEY_BYTES} bytes, so it is not a key", str(path), MAKE_KEY)
    return data


def _write_new(path: Path, data: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), mode)
    except FileExistsError as error:
        raise KeyFileError("is there already, and keys are not replaced", str(path), "Choose another name.") from error
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink()
        raise
