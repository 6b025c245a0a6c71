"""The delivery package: what the writer writes, the validator reads."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from exporters.package import validate, write_manifest
from exporters.package_schema import Manifest
from exporters.safe_files import FileEntry, hash_file, hash_whole
from tests.conftest import MakeStudent
from tools.tiny_student import modality_table, write_tiny_student


def test_the_validator_reads_what_the_writer_wrote(tiny_student: Path) -> None:
    package = validate(tiny_student)
    assert (package.name, package.version, package.license) == ("tiny-llama-int4", "1.0.0", "Apache-2.0")
    assert not package.plain
    image, audio = package.modalities["image"], package.modalities["audio"]
    assert (image.first, image.end, image.codebooks, image.codebook_size, image.grid) == (72, 104, 1, 32, (4, 4))
    assert (audio.first, audio.end, audio.codebooks, audio.codebook_size, audio.grid) == (104, 136, 2, 16, (6, 2))
    assert (audio.begin, audio.end_token) == ("<audio>", "</audio>")
    assert image.discretizer == tiny_student / "discretizers" / "image"
    assert image.preprocessing == {"size": [16, 16], "channels": 1, "mean": [0.5], "std": [0.5]}
    assert audio.preprocessing == {"sample_rate": 8000, "samples": 96, "channels": 1, "peak": 0.9}
    text = package.modalities["text"]
    assert (text.first, text.end, text.discretizer) == (0, 64, None)


def test_every_file_is_listed_with_its_hash(tiny_student: Path) -> None:
    package = validate(tiny_student)
    on_disk = {path.relative_to(tiny_student).as_posix() for path in tiny_student.rglob("*") if path.is_file()}
    assert set(package.files) == on_disk - {"package.json"}
    for name, entry in package.files.items():
        raw = (tiny_student / name).read_bytes()
        assert entry == FileEntry(len(raw), hashlib.sha256(raw).hexdigest())


def test_the_hash_of_the_whole_follows_the_format(tiny_student: Path) -> None:
    manifest = json.loads((tiny_student / "package.json").read_text())
    lines = sorted(f"{path}\t{entry['size']}\t{entry['sha256']}\n" for path, entry in manifest["files"].items())
    assert manifest["sha256"] == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert hash_whole({}) == hashlib.sha256(b"").hexdigest()


def test_the_schema_is_published() -> None:
    schema = Manifest.model_json_schema()
    assert set(schema["required"]) == {"format", "name", "version", "license", "modalities", "files", "sha256"}
    assert schema["additionalProperties"] is False


def test_writing_twice_gives_the_same_manifest(tmp_path: Path) -> None:
    folder = write_tiny_student(tmp_path / "a")
    before = (folder / "package.json").read_bytes()
    package = write_manifest(folder, "tiny-llama-int4", "1.0.0", "Apache-2.0", modality_table())
    assert (folder / "package.json").read_bytes() == before
    assert package == validate(folder)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, tiny_student: Path) -> None:
    again = write_tiny_student(tmp_path / "again")
    other = write_tiny_student(tmp_path / "other", seed=1)
    assert (again / "package.json").read_bytes() == (tiny_student / "package.json").read_bytes()
    assert validate(other).sha256 != validate(again).sha256


@pytest.mark.parametrize("variant", ["float", "int8", "int4"])
def test_the_tiny_student_is_tiny(make_tiny_student: MakeStudent, variant: str) -> None:
    assert sum(entry.size for entry in validate(make_tiny_student(variant=variant)).files.values()) < 1 << 20


def test_a_plain_transformers_folder_is_accepted(tiny_student: Path, tmp_path: Path) -> None:
    folder = tmp_path / "My model (v2)"
    folder.mkdir()
    for path in [*tiny_student.glob("model*"), tiny_student / "config.json", tiny_student / "tokenizer/tokenizer.json"]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "README.md").write_text("not part of it")
    package = validate(folder)
    assert (package.name, package.version, package.license) == ("My-model-v2", "0.0.0", "unknown")
    assert package.plain
    assert [(name, entry.first, entry.end) for name, entry in package.modalities.items()] == [("text", 0, 136)]
    assert "README.md" not in package.files
    assert package.files["config.json"] == hash_file(folder / "config.json")


def test_validating_needs_no_torch(tiny_student: Path) -> None:
    code = (
        "import sys; from exporters.package import validate; validate(sys.argv[1]);"
        "assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_student)], check=True)
