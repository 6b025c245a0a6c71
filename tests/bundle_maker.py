"""Small, whole bundles for tests: every field of the manifest, a few bytes per file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtimes.bundle import Bundle, load_bundle, staged, write_manifest

FILES = {"onnx/lm.exact.onnx": b"graph", "onnx/lm.data": bytes(range(256)) * 64, "golden/lm.safetensors": b"golden"}


def manifest(version: str = "1.0.0", **changes: Any) -> dict[str, Any]:
    """A manifest as a builder gives it to write_manifest; `changes` replace top-level fields."""
    lm = {
        "component": "lm",
        "backend": "onnx",
        "form": "fused",
        "mode": "exact",
        "model": "onnx/lm.exact.onnx",
        "files": ["onnx/lm.exact.onnx", "onnx/lm.data"],
        "inputs": [{"name": "ids", "dtype": "int32", "shape": [1, "S"]}],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": [1, 1672]}],
        "states": [
            {
                "name": "key_0",
                "dtype": "float32",
                "shape": [1, 2, 256, 32],
                "input": "past_key_0",
                "output": "present_key_0",
            }
        ],
        "precision": {"weights": "int4 g32", "activations": "float32"},
        "bytes_per_token": 900_000,
        "operators": {"MatMulNBits": 17},
        "preferred": True,
    }
    audio = {
        "tokens": [648, 1672],
        "codebooks": 4,
        "codebook_size": 256,
        "grid": [20, 4],
        "begin": 390,
        "end": 391,
        "preprocessing": {"sample_rate": 8000},
    }
    fields: dict[str, Any] = {
        "build_key": "0" * 64,
        "student": {"name": "tiny", "version": version, "license": "CC-BY-SA-4.0", "sha256": "1" * 64},
        "profile": {"name": "host"},
        "vocab_size": 1672,
        "context": 256,
        "special": {"bos": 384, "eos": [385], "pad": None},
        "tokenizer": None,
        "modalities": {"text": {"tokens": [0, 384]}, "audio": audio},
        "artifacts": [lm],
        "golden": {"lm": "golden/lm.safetensors"},
        "tolerances": [{"component": "lm", "gate": "export", "metric": "kl", "limit": 1e-4, "source": "profile"}],
        "inheritance": {"identical": 51, "total": 51, "mismatches": []},
        "tools": {"onnx": "1.23.2"},
        "licenses": ["CC-BY-SA-4.0"],
        "mutable": ["report.json", "report.md"],
        "created": "2026-11-21T12:00:00Z",
    }
    return fields | changes


def write_files(folder: Path, marker: bytes = b"") -> None:
    """The bundle's files; `marker` makes one set of them differ from another."""
    for path, data in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data + marker)


def make_bundle(output: Path, version: str = "1.0.0", marker: bytes = b"", **options: Any) -> Bundle:
    """Builds and publishes a bundle; `options` go to `staged`."""
    with staged(output, **options) as folder:
        write_files(folder, marker)
        write_manifest(folder, manifest(version), options.get("progress", lambda stage, size: None))
        (folder / "report.json").write_text("[]")
    return load_bundle(output)


def edit_manifest(folder: Path, **changes: Any) -> None:
    """Changes top-level fields of a published manifest in place, as an attacker or an old version might."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
