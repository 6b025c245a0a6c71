"""The bundle's manifest.json as frozen values: the schema, checked by hand with the standard library alone.

A manifest comes from outside, so nothing in it is believed before it is checked: every error is a `BundleError` that
says which field is wrong and what to do. Keys that this version does not know are kept in `raw` and otherwise
ignored; a change that an old reader must not ignore raises `SCHEMA`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from runtimes.errors import Fault

SCHEMA = 1
AGAIN = "Make the bundle again with exporters.build."
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 32 << 20
# Beside the manifest where a bundle is signed (runtimes/signing.py): it signs the manifest, so it is not in `files`.
SIGNATURE = "manifest.sig"
MAX_SIGNATURE_BYTES = 4096
COMPONENTS = ("lm", "image_decoder", "image_encoder", "audio_decoder", "audio_encoder")
MODES = ("exact", "fast", "fp16")
# Left out when two manifests are compared: everything else of two builds from one input is equal.
VOLATILE = ("created",)
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
SHA256 = re.compile(r"[0-9a-f]{64}")
# https://semver.org, number 11; a build part ("+…") does not take part in the order.
_VERSION = re.compile(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})(?:-([0-9A-Za-z.-]{1,64}))?(?:\+[0-9A-Za-z.-]{1,64})?")


class BundleError(Fault):
    """A bundle, or the place it is to go to, is not usable."""


class UnsafeBundlePath(BundleError):
    """A path in a bundle leaves its folder, or is a link or a device."""


@dataclass(frozen=True)
class FileInfo:
    """One file of the bundle: size in bytes and SHA-256 in lower-case hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output. A dimension is an int, or a name where its length is free."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class StateSpec:
    """A state (KV cache) tensor: the graph takes it as `input` and returns it, updated, as `output`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    input: str
    output: str


@dataclass(frozen=True)
class Artifact:
    """One backend's output for one component. Paths are relative to the bundle."""

    component: str
    backend: str
    form: str
    mode: str
    model: str
    files: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[StateSpec, ...]
    precision: Mapping[str, str]
    bytes_per_token: int | None
    operators: Mapping[str, int]
    preferred: bool
    #: distribution on the device -> release that the artifact needs, as in {"openvino": "2026.4"}; its parts must be
    #: the first ones of the installed version.
    runtime: Mapping[str, str] = field(default_factory=dict)
    #: what only the backend's own session reads, such as compiled prefill lengths; plain JSON values
    options: Mapping[str, Any] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(repr=False, default_factory=dict)

    @property
    def label(self) -> str:
        """`backend/form/mode`, as profiles write it."""
        return f"{self.backend}/{self.form}/{self.mode}"


@dataclass(frozen=True)
class Modality:
    """Token ids [first, end) of a modality; `begin` and `end_token` are the ids that wrap it (None for text).

    `grid` is the number of codes per axis, row-major; with several codebooks the last axis is the codebook, and the
    token at (t, k) is first + k * codebook_size + code.
    """

    name: str
    first: int
    end: int
    codebooks: int
    codebook_size: int
    grid: tuple[int, ...]
    begin: int | None
    end_token: int | None
    preprocessing: Mapping[str, Any]

    @property
    def length(self) -> int:
        """Tokens between `begin` and `end_token`."""
        return math.prod(self.grid) if self.grid else 0


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids; `eos` may hold several."""

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None


@dataclass(frozen=True)
class StudentInfo:
    """Which student the bundle was made from; `sha256` is its package's hash."""

    name: str
    version: str
    license: str
    sha256: str


@dataclass(frozen=True)
class Tolerance:
    """The limit of one gate for one component, and where the number comes from."""

    component: str
    gate: str
    metric: str
    limit: float
    source: str


@dataclass(frozen=True)
class Manifest:
    """Every field of manifest.json; `raw` is the parsed JSON itself."""

    build_key: str
    student: StudentInfo
    profile: Mapping[str, Any]
    vocab_size: int
    context: int
    special: SpecialTokens
    tokenizer: str | None
    modalities: Mapping[str, Modality]
    artifacts: tuple[Artifact, ...]
    golden: Mapping[str, str]
    tolerances: tuple[Tolerance, ...]
    inheritance: Mapping[str, Any]
    #: what the build quantised by itself (settings, calibration, mean_kl, matrices); empty where it did not
    quantisation: Mapping[str, Any]
    tools: Mapping[str, str]
    licenses: tuple[Any, ...]
    files: Mapping[str, FileInfo]
    mutable: tuple[str, ...]
    raw: Mapping[str, Any] = field(repr=False)


def dump_manifest(manifest: Mapping[str, Any]) -> bytes:
    """The one text of a manifest: UTF-8, keys sorted, so equal contents are equal bytes."""
    text = json.dumps(manifest, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def comparable(manifest: Mapping[str, Any]) -> bytes:
    """The manifest's text without its `created` time: equal for two builds from the same input."""
    return dump_manifest({key: value for key, value in manifest.items() if key not in VOLATILE})


def parse_version(text: str) -> tuple[Any, ...]:
    """A key that orders semantic versions by https://semver.org number 11. Raises BundleError on any other text."""
    match = _VERSION.fullmatch(text)
    if match is None:
        raise BundleError("is not a semantic version", f"version {text!r}", "Write it as in 1.2.0 or 1.2.0-rc.1.")
    major, minor, patch, pre = match.groups()
    parts = tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in pre.split(".")) if pre else ()
    return int(major), int(minor), int(patch), pre is None, parts


def safe_path(path: str, where: str) -> str:
    """`path` if it is a plain relative path with forward slashes; UnsafeBundlePath otherwise."""
    parts = PurePosixPath(path).parts
    plain = bool(parts) and "/".join(parts) == path and not path.startswith("/")
    if not plain or ".." in parts or "\\" in path or ":" in parts[0] or any(ord(c) < 32 for c in path):
        raise UnsafeBundlePath(f"{path!r} is not a plain path inside the bundle", where, AGAIN)
    return path
