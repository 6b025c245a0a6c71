"""Signatures and keys that are not sound, and bundles of a wrong signer: each refused by name, with the way out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization as forms
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from runtimes.archive import pack, unpack
from runtimes.bundle import Bundle, BundleError, UnsafeBundlePath, load_bundle
from runtimes.cli import open_bundle
from runtimes.keys import KeyFileError, load_private_key, load_public_key, make_keys, trusted_keys
from runtimes.signing import TRUST_VARIABLE, SignatureError, main, open_signed, sign_bundle
from tests.bundle_maker import edit_manifest, make_bundle
from tests.refusals import raises


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed bundle and its maker's keys; read only."""
    folder = tmp_path_factory.mktemp("made")
    make_keys(folder / "maker")
    sign_bundle(make_bundle(folder / "bundle").folder, folder / "maker")
    return folder


@pytest.fixture
def key(made: Path) -> Path:
    return made / "maker"


@pytest.fixture
def trust(key: Path) -> Path:
    return Path(f"{key}.pub")


@pytest.fixture
def signed(made: Path, tmp_path: Path) -> Bundle:
    """The signed bundle, copied: a test may damage it."""
    return load_bundle(shutil.copytree(made / "bundle", tmp_path / "bundle"))


def refused(act: Callable[[], object], kind: type[BundleError] = SignatureError) -> str:
    with raises(kind) as caught:
        act()
    assert caught.value.what and caught.value.where and caught.value.way_out
    return str(caught.value)


def edit_signature(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.sig"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Who signed, and what


def test_a_wrong_signer(signed: Bundle, trust: Path, tmp_path: Path) -> None:
    stranger = make_keys(tmp_path / "stranger")
    sign_bundle(signed.folder, tmp_path / "stranger")
    said = refused(lambda: open_bundle(signed.folder, trust))
    assert f"the key {stranger.fingerprint}, which is not trusted here" in said
    assert f"trusted: {load_public_key(trust).fingerprint} (maker.pub)" in said and "--trust" in said


def test_a_wrong_signer_who_claims_to_be_the_right_one(signed: Bundle, trust: Path, tmp_path: Path) -> None:
    make_keys(tmp_path / "stranger")
    sign_bundle(signed.folder, tmp_path / "stranger")
    edit_signature(signed.folder, public_key=load_public_key(trust).raw.hex())
    said = refused(lambda: open_bundle(signed.folder, trust))
    assert "is not the signature of this manifest.json" in said and load_public_key(trust).fingerprint in said


def test_an_unsigned_bundle(signed: Bundle, trust: Path) -> None:
    (signed.folder / "manifest.sig").unlink()
    assert "is not signed" in refused(lambda: open_bundle(signed.folder, trust))


def test_a_changed_manifest(signed: Bundle, trust: Path) -> None:
    edit_manifest(signed.folder, vocab_size=1673)
    assert "one of the two was changed" in refused(lambda: open_bundle(signed.folder, trust))


def test_a_manifest_that_differs_in_its_spaces_alone(signed: Bundle, trust: Path) -> None:
    with open(signed.folder / "manifest.json", "ab") as file:
        file.write(b"\n")
    assert "one of the two was changed" in refused(lambda: open_bundle(signed.folder, trust))


def test_a_signature_of_another_bundle(signed: Bundle, trust: Path, key: Path, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other", "1.0.1")
    sign_bundle(other.folder, key)
    shutil.copy(other.folder / "manifest.sig", signed.folder)
    assert "one of the two was changed" in refused(lambda: open_bundle(signed.folder, trust))


def test_a_changed_file_below_a_sound_signature(signed: Bundle, trust: Path) -> None:
    data = bytearray(signed.file("onnx/lm.data").read_bytes())
    data[0] ^= 1
    signed.file("onnx/lm.data").write_bytes(data)
    assert "lm.data: does not have the manifest's SHA-256" in refused(
        lambda: open_bundle(signed.folder, trust), BundleError
    )


def test_the_signature_is_asked_for_before_the_manifest_is_parsed(signed: Bundle, trust: Path) -> None:
    (signed.folder / "manifest.json").write_bytes(b'{"a": ' * 50_000)
    shutil.rmtree(signed.folder / "onnx")
    assert "one of the two was changed" in refused(lambda: open_bundle(signed.folder, trust))


def test_a_damaged_bundle_gets_no_signature(signed: Bundle, key: Path) -> None:
    (signed.folder / "manifest.sig").unlink()
    (signed.folder / "onnx" / "lm.data").write_bytes(b"short")
    assert "lm.data" in refused(lambda: sign_bundle(signed.folder, key), BundleError)
    assert not (signed.folder / "manifest.sig").exists()


# The signature file


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe{}",
        b'{"schema": 1, "schema": 1}',
        b'{"schema": NaN}',
        b"[" * 4000,
        b"{}",
        b'{"schema": true, "algorithm": "ed25519"}',
        b'{"schema": 1, "algorithm": null}',
        b'{"schema": 1, "algorithm": "ed25519", "public_key": 5}',
    ],
)
def test_signature_files_that_are_not_what_they_should_be(signed: Bundle, trust: Path, data: bytes) -> None:
    (signed.folder / "manifest.sig").write_bytes(data)
    assert "manifest.sig" in refused(lambda: open_bundle(signed.folder, trust))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("schema", 2, "version 2 is not 1"),
        ("algorithm", "none", "'none' is not 'ed25519'"),
        ("algorithm", "ED25519", "is not 'ed25519'"),
        ("algorithm", "rsa-pss", "is not 'ed25519'"),
        ("public_key", "", "is not 32 bytes"),
        ("public_key", "0" * 63, "is not 32 bytes"),
        ("public_key", "é" * 64, "is not 32 bytes"),
        ("signature", "0" * 126, "is not 64 bytes"),
        ("signature", "0X" + "0" * 126, "is not 64 bytes"),
        ("signature", "A" * 128, "is not 64 bytes"),
        ("signature", "0" * 128, "one of the two was changed"),
        ("signature", "f" * 128, "one of the two was changed"),
    ],
)
def test_fields_that_are_wrong(signed: Bundle, trust: Path, field: str, value: object, expected: str) -> None:
    edit_signature(signed.folder, **{field: value})
    assert expected in refused(lambda: open_bundle(signed.folder, trust))


def test_a_huge_signature_file_is_not_read(signed: Bundle, trust: Path, tmp_path: Path) -> None:
    with open(signed.folder / "manifest.sig", "wb") as file:
        file.truncate(1 << 40)  # sparse
    assert "is larger than 4096 bytes" in refused(lambda: open_bundle(signed.folder, trust))
    assert "is larger than 4096 bytes" in refused(lambda: open_bundle(signed.folder), BundleError)
    assert "is larger than 4096 bytes" in refused(lambda: pack(signed.folder, tmp_path / "a.tar"), BundleError)


def test_an_archive_with_a_large_signature(signed: Bundle, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.add(signed.folder / "manifest.json", "manifest.json")
        archive.add(signed.folder / "onnx" / "lm.data", "manifest.sig")
    said = refused(lambda: unpack(tmp_path / "b.tar", tmp_path / "out"), BundleError)
    assert "'manifest.sig' has 16384 bytes" in said
    assert not (tmp_path / "out").exists()


def test_a_signature_that_is_a_link_a_fifo_or_a_folder(signed: Bundle, trust: Path, tmp_path: Path) -> None:
    path = signed.folder / "manifest.sig"
    os.rename(path, tmp_path / "elsewhere.sig")
    path.symlink_to(tmp_path / "elsewhere.sig")
    assert "is a link" in refused(lambda: open_bundle(signed.folder, trust), UnsafeBundlePath)
    assert "is a link" in refused(lambda: open_bundle(signed.folder), UnsafeBundlePath)
    path.unlink()
    path.symlink_to("nowhere")
    assert "is a link" in refused(lambda: open_bundle(signed.folder, trust), UnsafeBundlePath)
    path.unlink()
    os.mkfifo(path)
    assert "is not a plain file" in refused(lambda: open_bundle(signed.folder, trust), UnsafeBundlePath)
    path.unlink()
    path.mkdir()
    assert "is not a plain file" in refused(lambda: open_bundle(signed.folder, trust), UnsafeBundlePath)


def test_a_link_in_the_place_of_a_signature_is_not_written_through(signed: Bundle, key: Path, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("years of work")
    for name in ("manifest.sig", ".manifest.sig.new"):
        (signed.folder / "manifest.sig").unlink(missing_ok=True)
        (signed.folder / name).symlink_to(tmp_path / "victim")
        assert "is a link" in refused(lambda: sign_bundle(signed.folder, key), UnsafeBundlePath)
        (signed.folder / name).unlink()
    assert (tmp_path / "victim").read_text() == "years of work"


# Keys


def pem(key: Any, encryption: forms.KeySerializationEncryption | None = None) -> tuple[bytes, bytes]:
    """(private, public) PEM of a key."""
    wrapped = encryption or forms.NoEncryption()
    secret = key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, wrapped)
    return secret, key.public_key().public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)


def test_key_files_of_another_kind(tmp_path: Path) -> None:
    secret, public = pem(ec.generate_private_key(ec.SECP256R1()))
    (tmp_path / "ec").write_bytes(secret)
    (tmp_path / "ec.pub").write_bytes(public)
    assert "is another kind of key" in refused(lambda: load_private_key(tmp_path / "ec"), KeyFileError)
    assert "is another kind of key" in refused(lambda: load_public_key(tmp_path / "ec.pub"), KeyFileError)


def test_the_halves_of_a_pair_are_told_apart(key: Path, trust: Path) -> None:
    said = refused(lambda: trusted_keys(key), KeyFileError)
    assert "is a private key" in said and "maker.pub" in said
    assert "is a public key" in refused(lambda: load_private_key(trust), KeyFileError)


def test_an_encrypted_key(tmp_path: Path) -> None:
    secret, _ = pem(ed25519.Ed25519PrivateKey.generate(), forms.BestAvailableEncryption(b"word"))
    (tmp_path / "key").write_bytes(secret)
    said = refused(lambda: load_private_key(tmp_path / "key"), KeyFileError)
    assert "is encrypted" in said and "openssl pkey" in said


@pytest.mark.parametrize("data", [b"", b"\0" * 32, b"ssh-ed25519 AAAA", b"-----BEGIN PUBLIC KEY-----\n", b"x" * 20_000])
def test_files_that_are_no_keys(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "key").write_bytes(data)
    refused(lambda: load_public_key(tmp_path / "key"), KeyFileError)
    refused(lambda: load_private_key(tmp_path / "key"), KeyFileError)


def test_places_of_keys_that_hold_none(tmp_path: Path, key: Path) -> None:
    assert "No such file" in refused(lambda: trusted_keys(tmp_path / "nowhere"), BundleError)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "key").write_text("not named .pub")
    assert "holds 0 files named *.pub" in refused(lambda: trusted_keys(tmp_path / "empty"), KeyFileError)
    os.mkfifo(tmp_path / "fifo")
    assert "is not a plain file" in refused(lambda: trusted_keys(tmp_path / "fifo"), KeyFileError)
    assert "is not a plain file" in refused(lambda: load_private_key(tmp_path), KeyFileError)


def test_one_bad_key_in_a_folder_is_named(signed: Bundle, trust: Path, tmp_path: Path) -> None:
    folder = tmp_path / "trust"
    folder.mkdir()
    shutil.copy(trust, folder)
    (folder / "broken.pub").write_text("x")
    assert "broken.pub" in refused(lambda: open_signed(signed.folder, folder), KeyFileError)


def test_an_empty_variable_does_not_switch_the_check_off(signed: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUST_VARIABLE, "")
    assert "is set, but empty" in refused(lambda: open_bundle(signed.folder), KeyFileError)


def test_keys_are_not_written_through_links_or_into_nowhere(tmp_path: Path) -> None:
    (tmp_path / "key").symlink_to(tmp_path / "target")
    assert "is there already" in refused(lambda: make_keys(tmp_path / "key"), KeyFileError)
    assert not (tmp_path / "target").exists()
    assert "No such file" in refused(lambda: make_keys(tmp_path / "no" / "key"), BundleError)


def test_a_device_without_the_package_refuses_and_says_so(signed: Bundle, trust: Path) -> None:
    block = "import sys; sys.modules['cryptography'] = None; from runtimes.{0} import main; sys.exit(main({1!r}))"
    commands = {
        "signing": ["verify", str(signed.folder), "--trust", str(trust)],
        "parity": [str(signed.folder), "--trust", str(trust)],
    }
    for module, arguments in commands.items():
        code = block.format(module, arguments)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 2 and "edge-export[sign]" in done.stderr and "Traceback" not in done.stderr


def test_the_command_ends_in_one_line(signed: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_keys(tmp_path / "stranger")
    assert main(["verify", str(signed.folder), "--trust", str(tmp_path / "stranger.pub")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
