"""Signed bundles: an Ed25519 signature of manifest.json, and so, by its hashes, of every file of the bundle.

    python -m runtimes.signing keygen KEY                   # KEY (private, keep it) and KEY.pub (for the devices)
    python -m runtimes.signing sign BUNDLE --key KEY
    python -m runtimes.signing verify BUNDLE --trust KEY.pub

The signature lies beside the manifest in `manifest.sig`:

    {"schema": 1, "algorithm": "ed25519", "public_key": "<hex>", "signature": "<hex>"}

It is the plain Ed25519 signature (RFC 8032) of the exact bytes of manifest.json. The public key in it says who claims
to have signed; only the keys that the reader trusts decide. Reports may change after the build, so they are not
covered.

Needs the `cryptography` package, where bundles are signed and where signatures are asked for: extra `sign`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from runtimes.bundle import Bundle, load_bundle, read_manifest
from runtimes.errors import Fault
from runtimes.files import open_plain, storage_errors, write_durably
from runtimes.keys import KeyFileError, PublicKey, load_private_key, make_keys, trusted_keys
from runtimes.manifest import MAX_SIGNATURE_BYTES, SIGNATURE, BundleError
from runtimes.strict_json import get, load_json

TRUST_VARIABLE = "EDGE_EXPORT_TRUST"
SCHEMA = 1
ALGORITHM = "ed25519"
RESIGN = "Get the bundle again from its maker, or sign it again: python -m runtimes.signing sign BUNDLE --key KEY"


class SignatureError(BundleError):
    """A bundle is not signed, not by a trusted key, or not as it was when it was signed."""


@dataclass(frozen=True)
class Signature:
    """What manifest.sig holds: who claims to have signed, and the 64 bytes that show it."""

    key: PublicKey
    value: bytes


def trust_place(given: Path | None) -> Path | None:
    """Where the trusted keys are: `given`, else the environment; None where neither asks for signatures.

    Raises KeyFileError for a variable that is set but empty: a mistake must not switch the check off.
    """
    named = os.environ.get(TRUST_VARIABLE)
    if given is not None or named is None:
        return given
    if not named:
        way_out = "Name a public key or a folder of them, or unset it to take bundles unsigned."
        raise KeyFileError("is set, but empty", TRUST_VARIABLE, way_out)
    return Path(named)


def sign_bundle(folder: Path, key_file: Path) -> PublicKey:
    """Verifies a bundle and writes its manifest.sig, in place of an older one. Raises BundleError."""
    key, manifest = load_private_key(key_file), read_manifest(folder)
    # What is damaged must not get a signature that says it is as its maker left it.
    load_bundle(folder, manifest).verify()
    public = PublicKey(key.public_key().public_bytes_raw())
    fields = {"schema": SCHEMA, "algorithm": ALGORITHM, "public_key": public.raw.hex()}
    text = json.dumps({**fields, "signature": key.sign(manifest).hex()}, indent=1) + "\n"
    with storage_errors(folder):
        write_durably(folder / SIGNATURE, text.encode())
    return public


def read_signature(folder: Path) -> Signature:
    """The checked form of manifest.sig; its signature is not verified. Raises SignatureError, UnsafeBundlePath."""
    path = folder / SIGNATURE
    try:
        with storage_errors(path), open(open_plain(path), "rb") as file:
            data = file.read(MAX_SIGNATURE_BYTES + 1)
    except BundleError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise SignatureError(
                "is not signed, and signed bundles alone are trusted here", str(folder), RESIGN
            ) from None
        raise
    if len(data) > MAX_SIGNATURE_BYTES:
        raise SignatureError(f"is larger than {MAX_SIGNATURE_BYTES} bytes", str(path), RESIGN)
    try:
        fields = load_json(data, SIGNATURE)
        if (schema := get(fields, "schema", int, "")) != SCHEMA:
            raise BundleError(f"version {schema} is not {SCHEMA}, the one this runtime reads", "schema", RESIGN)
        if (algorithm := get(fields, "algorithm", str, "")) != ALGORITHM:
            raise BundleError(f"{algorithm[:64]!r} is not {ALGORITHM!r}", "algorithm", RESIGN)
        key = PublicKey(_from_hex(get(fields, "public_key", str, ""), 32, "public_key"))
        return Signature(key, _from_hex(get(fields, "signature", str, ""), 64, "signature"))
    except BundleError as error:
        raise SignatureError(error.what, f"{path}: {error.where}", RESIGN) from error


def check_signature(folder: Path, manifest: bytes, trusted: tuple[PublicKey, ...]) -> PublicKey:
    """The trusted key that signed these bytes of the folder's manifest. Raises SignatureError naming the signer."""
    signature = read_signature(folder)
    signer = next((key for key in trusted if key.raw == signature.key.raw), None)
    if signer is None:
        known = ", ".join(map(str, trusted[:8])) + (f" and {len(trusted) - 8} more" if len(trusted) > 8 else "")
        way_out = (
            f"Get it from a signer that you trust; if you know this one, add its .pub to --trust ({TRUST_VARIABLE})."
        )
        what = f"names as its signer the key {signature.key}, which is not trusted here; trusted: {known}"
        raise SignatureError(what, str(folder / SIGNATURE), way_out)
    if not signer.signed(signature.value, manifest):
        what = f"is not the signature of this manifest.json by the key {signer}: one of the two was changed"
        raise SignatureError(what, str(folder / SIGNATURE), RESIGN)
    return signer


def open_signed(path: Path, trust: Path) -> tuple[Bundle, PublicKey]:
    """Opens a bundle after its signature was checked; nothing but its manifest and manifest.sig is read before.

    The bytes whose signature is checked are those that are then parsed. `Bundle.verify` remains to be called.
    """
    trusted = trusted_keys(trust)
    manifest = read_manifest(path)
    signer = check_signature(path, manifest, trusted)
    return load_bundle(path, manifest), signer


def _from_hex(text: str, size: int, where: str) -> bytes:
    if len(text) != 2 * size or not set(text) <= set("0123456789abcdef"):
        raise BundleError(f"is not {size} bytes in lower-case hexadecimal", where, RESIGN)
    return bytes.fromhex(text)


def _run(given: argparse.Namespace) -> str:
    if given.command == "keygen":
        return f"{given.key} and {make_keys(given.key)}: give devices the .pub, keep the other"
    if given.command == "sign":
        return f"{given.bundle}: signed by {sign_bundle(given.bundle, given.key)}"
    place = trust_place(given.trust)
    if place is None:
        raise KeyFileError("no trusted key is named", "verify", f"Give --trust KEY.pub, or set {TRUST_VARIABLE}.")
    bundle, signer = open_signed(given.bundle, place)
    bundle.verify()
    return f"{given.bundle}: {bundle.student.name} {bundle.student.version}, whole, signed by {signer}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m runtimes.signing", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("keygen", help="make a key pair: KEY (private) and KEY.pub")
    making.add_argument("key", type=Path, metavar="KEY")
    signing = commands.add_parser("sign", help="verify a bundle and sign it")
    signing.add_argument("bundle", type=Path, metavar="BUNDLE")
    signing.add_argument("--key", type=Path, required=True, metavar="KEY", help="private key")
    verifying = commands.add_parser("verify", help="check a bundle's signature and every file")
    verifying.add_argument("bundle", type=Path, metavar="BUNDLE")
    where = f"public key, or a folder of *.pub (default: ${TRUST_VARIABLE})"
    verifying.add_argument("--trust", type=Path, metavar="KEY.pub", help=where)
    try:
        print(_run(parser.parse_args(arguments)))
    except Fault as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
