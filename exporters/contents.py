"""What a bundle holds besides artifacts and golden files, and the manifest that names it all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Collection, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device_profiles.schema import Profile
from exporters.inheritance import Inheritance
from exporters.student import Student
from runtimes.bundle import Artifact

if TYPE_CHECKING:
    from exporters.noise import Floor
    from exporters.quantise import Quantised

#: Distributions whose version decides what an artifact holds.
TOOLS = (
    "torch",
    "transformers",
    "diffusers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "nncf",
    "apache-tvm",
    "apache-tvm-ffi",
    "coremltools",
    "tensorrt_rtx",
    "safetensors",
    "tokenizers",
    "numpy",
)
MUTABLE = ("report.json", "report.md")
CARDS = ("MODEL_CARD.md", "DATA_CARD.md", "quality.json")

#: Factor on the float32 reference's own noise that an export may reach, and the one below which two logits are a tie.
NOISE_FACTOR, TIE_FACTOR = 100, 10
#: Factor on a noise floor's power: KL divergence grows with the square of an error, as signal-to-noise ratios do. The
#: share of flipped tokens grows with the error itself.
FLOOR_FACTOR = 10
#: Share of positions that may differ where the floor's own share is smaller: the exact mode's.
LEAST_FLIPS = 0.005
#: In the place of a floor's precision: a student whose layers round their inputs, in float32 against itself in float64.
ROUNDED = "rounded"

#: Component and artifact -> what `python -m runtimes.finalize` writes beside the bundle's own files on the device.
ENGINE_FILES = ("engines/{name}.engine", "engines/{name}.json")
SHARED_ENGINE_FILES = ("engines/timing.cache", "engines/libedge_plugins.so")

FINALIZE = """
Artifacts of TensorRT become engines on the device itself, in one step that checks the device, builds, proves and times:

    python -m runtimes.finalize .
"""
USAGE = """# {name} {version} for {profile}

This folder runs with the runtime of edge-export alone (its extras {extras}; PyTorch is not needed):

    python -m runtimes.generate . --prompt "..." --to {outputs}
    python -m runtimes.parity .      # checks every artifact against the golden outputs in golden/
    python -m runtimes.bench .       # measures this machine

`manifest.json` lists every file with its SHA-256; `report.md` says what was proven, where, and what is still pending.
"""


def tool_versions() -> dict[str, str]:
    """Distribution -> installed version; the extras that are not installed are missing."""
    installed = {distribution.name for distribution in metadata.distributions()}
    return {name: metadata.version(name) for name in TOOLS if name in installed}


def build_key(student_sha256: Iterable[str], profile: Profile, options: Mapping[str, Any]) -> str:
    """A hash over everything that decides the result: the packages, the profile, the options, the tools, this code."""
    root = Path(__file__).parent.parent
    code = hashlib.sha256()
    sources = {"exporters": "*.py", "runtimes": "*.py", "device_profiles": "*.py", "kernels": "*"}
    for folder, pattern in sources.items():
        for path in sorted(path for path in (root / folder).rglob(pattern) if path.is_file()):
            code.update(f"{path.relative_to(root).as_posix()}\0".encode())
            code.update(path.read_bytes())
    parts = {
        "students": list(student_sha256),
        "profile": profile.as_dict(),
        "options": dict(options),
        "tools": tool_versions(),
        "code": code.hexdigest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def write_contents(student: Student, profile: Profile, backends: Collection[str], folder: Path) -> str | None:
    """Copies tokenizer and cards, writes the usage page and the bill of materials; returns the tokenizer's path."""
    tokenizer = None
    if student.tokenizer is not None:
        tokenizer = "tokenizer/tokenizer.json"
        (folder / "tokenizer").mkdir()
        shutil.copyfile(student.tokenizer, folder / tokenizer)
    for card in CARDS:
        if (student.folder / card).is_file():
            (folder / "docs").mkdir(exist_ok=True)
            shutil.copyfile(student.folder / card, folder / "docs" / card)
    outputs = "|".join(student.modalities)
    (folder / "README.md").write_text(
        USAGE.format(
            name=student.name,
            version=student.version,
            profile=profile.title,
            outputs=outputs,
            extras=", ".join(f"`{backend}`" for backend in backends if backend != "tensorrt" or _rtx(profile)),
        )
        + (FINALIZE if "tensorrt" in backends else ""),
        "utf-8",
    )
    (folder / "bom.json").write_text(json.dumps(_bill(student), indent=1, sort_keys=True) + "\n", "utf-8")
    return tokenizer


def _rtx(profile: Profile) -> bool:
    """Whether the device's TensorRT is a Python package; otherwise it is part of the device's own system."""
    return (profile.tensorrt_version or "").startswith("TensorRT-RTX")


def mutable_files(artifacts: Iterable[Artifact]) -> list[str]:
    """Paths that may come or change after the build: the reports, and what a device makes of TensorRT's artifacts."""
    files = list(MUTABLE)
    names = [f"{a.component}.{a.form}.{a.mode}" for a in artifacts if a.backend == "tensorrt"]
    files += [pattern.format(name=name) for name in names for pattern in ENGINE_FILES]
    return files + list(SHARED_ENGINE_FILES if names else ())


def _bill(student: Student) -> dict[str, Any]:
    """CycloneDX 1.6: the student and the tools that made the artifacts (https://cyclonedx.org/docs/1.6/json)."""
    model = {
        "type": "machine-learning-model",
        "name": student.name,
        "version": student.version,
        "licenses": [{"license": {"name": student.license}}],
        "hashes": [{"alg": "SHA-256", "content": student.sha256}],
    }
    tools = [
        {"type": "library", "name": name, "version": version, "purl": f"pkg:pypi/{name}@{version}"}
        for name, version in tool_versions().items()
    ]
    return {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "components": [model, *tools]}


def tolerances(
    profile: Profile, components: Iterable[str], noise: float, floors: Iterable[Floor] = ()
) -> list[dict[str, Any]]:
    """The manifest's limits: the profile's, and multiples of the measured noise floors where there are some."""
    rows = []

    def add(component: str, gate: str, metric: str, limit: float, source: str) -> None:
        rows.append({"component": component, "gate": gate, "metric": metric, "limit": limit, "source": source})

    def source(key: str) -> str:
        return f"profile {key}: {profile.source(key)}"

    floor = f"the float32 reference is {noise:.1e} from float64"
    for component in components:
        if component == "lm":
            scaled = NOISE_FACTOR * noise
            if scaled < profile.float_relative:
                add("lm", "export", "relative_max_error", scaled, f"{NOISE_FACTOR} x noise floor: {floor}")
            else:
                add("lm", "export", "relative_max_error", profile.float_relative, source("float_relative"))
            add("lm", "export", "noise", TIE_FACTOR * noise, f"{TIE_FACTOR} x noise floor: {floor}")
            add("lm", "export", "mean_kl", profile.kl, source("kl"))
            add("lm", "export", "same_top", profile.same_top, source("same_top"))
            if profile.quantise.kv_cache is not None:
                limit = profile.quantise.kv_cache_kl
                add("lm", "export-int8-cache", "mean_kl", limit, "profile quantise.kv_cache_kl: the int8 KV cache")
            kl, flips, also = _beside_activations(profile)
            add("lm", "export-fast", "mean_kl", profile.fast_kl + kl, source("fast_kl") + also)
            add("lm", "export-fast", "same_top", profile.fast_same_top - flips, source("fast_same_top") + also)
        elif component.endswith("_decoder"):
            add(component, "export", "relative_max_error", profile.codec_relative, source("codec_relative"))
            add(component, "export-int8", "psnr_loss", profile.codec_int8_loss_db, source("codec_int8_loss_db"))
    for found in floors:
        if found.precision == ROUNDED:
            rows += _above_rounding(found, profile)
            continue
        for metric, value in found.metrics.items():
            floor = f"the {found.precision} reference is at {value:.6g} against float32"
            text = f"{FLOOR_FACTOR} x the power of the noise floor: {floor}"
            add(
                found.component, f"export-{found.precision}", metric, _above_floor(metric, value, found.positions), text
            )
    return rows


def _beside_activations(profile: Profile) -> tuple[float, float, str]:
    """(nats, share of flips, why) that the fast mode is allowed on top of what int8 activations cost.

    An int8 cache has its own error beside theirs. Independent errors add up in power: KL divergences as they are, flips
    by their squares, and the cache may have as many as the activations (runtimes/gates.py).
    """
    if profile.quantise.kv_cache is None:
        return 0.0, 0.0, ""
    flips = (math.sqrt(2) - 1) * (1 - profile.fast_same_top)
    return profile.quantise.kv_cache_kl, flips, "; with what quantise.kv_cache_kl allows the int8 KV cache, in power"


def _above_rounding(found: Floor, profile: Profile) -> list[dict[str, Any]]:
    """Limits of the exact mode for a student whose layers round their inputs: a value near a tie falls to either side
    by the order of a sum alone. They replace the profile's where they are wider."""
    source = f"{FLOOR_FACTOR} x the power of the noise floor: rounded inputs, float32 against float64, are at"
    rows = []
    for metric, value in found.metrics.items():
        limit = _above_floor(metric, value, found.positions)
        usual = {"mean_kl": profile.kl, "p999_kl": 100 * profile.kl, "same_top": profile.same_top}[metric]
        if limit < usual if metric == "same_top" else limit > usual:
            text = f"{source} {value:.6g}"
            rows.append({"component": "lm", "gate": "export", "metric": metric, "limit": limit, "source": text})
    return rows


def _above_floor(metric: str, value: float, positions: int) -> float:
    """The limit that a noise floor gives."""
    if metric in ("mean_kl", "p999_kl"):
        return FLOOR_FACTOR * value
    if metric == "same_top":
        # A handful of flips is a count: three of its standard deviations on top.
        expected = positions * max(math.sqrt(FLOOR_FACTOR) * (1 - value), LEAST_FLIPS)
        return 1 - (expected + 3 * math.sqrt(expected)) / positions
    if metric == "ssim":
        return 1 - FLOOR_FACTOR * (1 - value)
    return value - 10 * math.log10(FLOOR_FACTOR)  # decibels


def loss_tolerances(profile: Profile, bits: int | None) -> list[dict[str, Any]]:
    """Limits of the quantisation-loss gate for the narrowest weights of the student; none for a float one."""
    if bits is None:
        return []
    keys = {"mean_kl": f"loss_int{bits}_kl", "same_top": f"loss_int{bits}_same_top"}
    rows = {metric: (getattr(profile, key), f"profile {key}: {profile.source(key)}") for metric, key in keys.items()}
    if (budget := profile.quantise.mean_kl) is not None:
        rows["mean_kl"] = budget, "profile quantise.mean_kl: the quality budget"
    return [
        {"component": "lm", "gate": "quantisation-loss", "metric": metric, "limit": limit, "source": source}
        for metric, (limit, source) in rows.items()
    ]


def manifest(
    student: Student,
    profile: Profile,
    key: str,
    capacity: int,
    tokenizer: str | None,
    artifacts: Collection[Artifact],
    golden: Mapping[str, str],
    limits: list[dict[str, Any]],
    inheritance: Inheritance,
    quantised: Quantised | None,
    created: str,
) -> dict[str, Any]:
    """The manifest but for the files, which ``runtimes.bundle.write_manifest`` hashes."""
    return {
        "build_key": key,
        "created": created,
        "student": {
            "name": student.name,
            "version": student.version,
            "license": student.license,
            "sha256": student.sha256,
        },
        "profile": profile.as_dict(),
        "vocab_size": student.config["vocab_size"],
        "context": capacity,
        "special": dict(student.special),
        "tokenizer": tokenizer,
        "modalities": {name: _modality(entry) for name, entry in student.modalities.items()},
        "artifacts": [_plain(artifact) for artifact in artifacts],
        "golden": dict(golden),
        "tolerances": limits,
        "inheritance": inheritance.as_dict(),
        "quantisation": quantised.as_dict() if quantised else {},
        "tools": tool_versions(),
        "licenses": [
            {"component": "student", "license": student.license},
            {"component": "edge-export", "license": "Apache-2.0"},
        ],
        "mutable": mutable_files(artifacts),
    }


def _modality(entry: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"tokens": [entry.first, entry.end]}
    if entry.grid:
        row |= {
            "codebooks": entry.codebooks,
            "codebook_size": entry.codebook_size,
            "grid": list(entry.grid),
            "begin": entry.begin_id,
            "end": entry.end_id,
            "preprocessing": dict(entry.preprocessing),
        }
    return row


def _plain(artifact: Artifact) -> dict[str, Any]:
    row = dataclasses.asdict(artifact)
    del row["raw"]
    return json.loads(json.dumps(row))
