"""Signing: a key pair, a signed bundle that travels, and commands that take only what a trusted key signed."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from runtimes import bench, generate, parity
from runtimes.archive import pack, unpack
from runtimes.bundle import Bundle, load_bundle, publish, staged, write_manifest
from runtimes.cli import open_bundle
from runtimes.keys import PublicKey, load_public_key, make_keys, trusted_keys
from runtimes.signing import TRUST_VARIABLE, main, open_signed, sign_bundle
from tests.bundle_maker import make_bundle, manifest, write_files


@pytest.fixture
def key(tmp_path: Path) -> Path:
    make_keys(tmp_path / "maker")
    return tmp_path / "maker"


@pytest.fixture
def signed(tmp_path: Path, key: Path) -> Bundle:
    bundle = make_bundle(tmp_path / "bundle")
    sign_bundle(bundle.folder, key)
    return bundle


def public(key: Path) -> Path:
    return Path(f"{key}.pub")


def test_a_signed_bundle_opens_and_names_its_signer(signed: Bundle, key: Path) -> None:
    bundle, signer = open_signed(signed.folder, public(key))
    bundle.verify()
    assert bundle == load_bundle(signed.folder)
    assert signer == load_public_key(public(key))
    assert signer.fingerprint.startswith("sha256:") and signer.source == "maker.pub"


def test_the_signature_file_is_the_documented_one(signed: Bundle, key: Path) -> None:
    fields = json.loads((signed.folder / "manifest.sig").read_bytes())
    assert list(fields) == ["schema", "algorithm", "public_key", "signature"]
    assert (fields["schema"], fields["algorithm"]) == (1, "ed25519")
    assert fields["public_key"] == load_public_key(public(key)).raw.hex()
    assert PublicKey(bytes.fromhex(fields["public_key"])).signed(
        bytes.fromhex(fields["signature"]), (signed.folder / "manifest.json").read_bytes()
    )


def test_the_verifier_agrees_with_rfc_8032() -> None:
    # RFC 8032, 7.1, TEST 3.
    key = PublicKey(bytes.fromhex("fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025"))
    signature = bytes.fromhex(
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
    )
    assert key.signed(signature, bytes.fromhex("af82"))
    assert not key.signed(signature, bytes.fromhex("af83"))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl to compare with")
def test_openssl_takes_the_keys_and_the_signature(signed: Bundle, key: Path, tmp_path: Path) -> None:
    fields = json.loads((signed.folder / "manifest.sig").read_bytes())
    (tmp_path / "raw.sig").write_bytes(bytes.fromhex(fields["signature"]))
    verify = ["openssl", "pkeyutl", "-verify", "-pubin", "-rawin", "-inkey", str(public(key))]
    inputs = ["-in", str(signed.folder / "manifest.json"), "-sigfile", str(tmp_path / "raw.sig")]
    subprocess.run([*verify, *inputs], check=True, capture_output=True)
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(tmp_path / "theirs")], check=True)
    pair = ["openssl", "pkey", "-in", str(tmp_path / "theirs"), "-pubout", "-out", str(tmp_path / "theirs.pub")]
    subprocess.run(pair, check=True)
    assert sign_bundle(signed.folder, tmp_path / "theirs").raw == load_public_key(tmp_path / "theirs.pub").raw


def test_private_keys_are_for_their_owner_and_never_replaced(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_keys(tmp_path / "key")
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "key").st_mode) == 0o600
    held = (tmp_path / "key").read_bytes(), (tmp_path / "key.pub").read_bytes()
    assert main(["keygen", str(tmp_path / "key")]) == 2
    assert ((tmp_path / "key").read_bytes(), (tmp_path / "key.pub").read_bytes()) == held
    (tmp_path / "key").unlink()
    assert main(["keygen", str(tmp_path / "key")]) == 2  # the public half of a pair that is in use somewhere
    assert [path.name for path in tmp_path.iterdir()] == ["key.pub"]


def test_a_folder_of_keys_trusts_each_of_them(signed: Bundle, key: Path, tmp_path: Path) -> None:
    make_keys(tmp_path / "other")
    trust = tmp_path / "trust"
    trust.mkdir()
    shutil.copy(public(tmp_path / "other"), trust)
    (trust / "mounted.pub").symlink_to(public(key))
    (trust / "README").write_text("not a key")
    assert [key.source for key in trusted_keys(trust)] == ["mounted.pub", "other.pub"]
    assert open_signed(signed.folder, trust)[1].source == "mounted.pub"
    sign_bundle(signed.folder, tmp_path / "other")
    assert open_signed(signed.folder, trust)[1].source == "other.pub"


def test_reports_may_change_after_signing(signed: Bundle, key: Path) -> None:
    signed.file("report.json").write_text('[{"status": "passed"}]')
    open_bundle(signed.folder, public(key))


def test_a_signature_travels_in_archives_and_copies(signed: Bundle, key: Path, tmp_path: Path) -> None:
    pack(signed.folder, tmp_path / "a.tar")
    unpack(tmp_path / "a.tar", tmp_path / "taken")
    publish(tmp_path / "taken", tmp_path / "published")
    for name in ("taken", "published"):
        open_bundle(tmp_path / name, public(key))
        assert (tmp_path / name / "manifest.sig").read_bytes() == (signed.folder / "manifest.sig").read_bytes()


def test_a_new_build_is_not_signed_by_the_old_signature(signed: Bundle, tmp_path: Path) -> None:
    with staged(tmp_path / "again") as folder:
        write_files(folder, b"new")
        shutil.copy(signed.folder / "manifest.sig", folder)
        built = write_manifest(folder, manifest("1.0.1"))
        assert "manifest.sig" not in built.files and not (folder / "manifest.sig").exists()


def test_without_trust_nothing_is_asked_for(signed: Bundle, tmp_path: Path) -> None:
    open_bundle(make_bundle(tmp_path / "unsigned").folder)
    (signed.folder / "manifest.sig").write_text("{")
    open_bundle(signed.folder)


def test_the_environment_names_the_trusted_keys(
    signed: Bundle, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unsigned, stranger = make_bundle(tmp_path / "unsigned"), make_keys(tmp_path / "stranger")
    monkeypatch.setenv(TRUST_VARIABLE, str(public(key)))
    open_bundle(signed.folder)
    assert main(["verify", str(signed.folder)]) == 0
    assert "signed by sha256:" in capsys.readouterr().out
    assert parity.main([str(unsigned.folder)]) == 2
    assert "is not signed" in capsys.readouterr().err
    # What the command line names counts instead.
    assert parity.main([str(signed.folder), "--trust", str(tmp_path / "stranger.pub")]) == 2
    assert stranger.fingerprint in capsys.readouterr().err


@pytest.mark.parametrize("command", [generate, parity, bench])
def test_every_command_asks_for_the_signature(
    command: object, tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_bundle(tmp_path / "bundle").folder
    more = ["--prompt", "x"] if command is generate else []
    assert command.main([str(folder), *more, "--trust", str(public(key))]) == 2  # type: ignore[attr-defined]
    said = capsys.readouterr().err
    assert "is not signed" in said and "runtimes.signing sign" in said
    assert command.parse([str(folder), *more]).trust is None  # type: ignore[attr-defined]


def test_the_commands_from_key_to_verdict(tmp_path: Path) -> None:
    folder = str(make_bundle(tmp_path / "bundle").folder)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "runtimes.signing", *arguments], capture_output=True, text=True)

    key = str(tmp_path / "key")
    made, done = run("keygen", key), run("sign", folder, "--key", key)
    checked = run("verify", folder, "--trust", key + ".pub")
    assert [made.returncode, done.returncode, checked.returncode] == [0, 0, 0], (made, done, checked)
    fingerprint = load_public_key(tmp_path / "key.pub").fingerprint
    assert all(fingerprint in result.stdout for result in (made, done, checked))
    assert "tiny 1.0.0, whole, signed by" in checked.stdout
    blind = run("verify", folder)
    assert blind.returncode == 2 and "no trusted key is named" in blind.stderr and "Traceback" not in blind.stderr
