"""Engines on this machine: where they lie, what they were built from, and why one is refused.

An engine belongs to one GPU, TensorRT version and system, and deserialising it runs what is in it. So each that was
built here has a sidecar, engines/<name>.json, that names all of this and is sealed by a key that never leaves the
machine (runtimes/machine_key.py):

    {"built": {"schema": 1, "compiler": ..., "sm": ..., "gpu": ..., "uuid": ..., "cuda": ..., "system": ...,
               "engine": sha256, "size": bytes, "source": sha256 over what it was made of,
               "packaging": "none", "library" or "ahead-of-time", "plugins": sha256 or "", "timings": sha256 or "",
               "created": UTC},
     "seal": HMAC-SHA256 of "built"}

`read` gives the bytes of an engine that passed every check, and no others: nothing is read a second time in between.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runtimes.bundle import Artifact, Bundle, BundleError
from runtimes.errors import Fault
from runtimes.files import hash_file, open_plain, storage_errors, write_durably
from runtimes.machine_key import is_sealed, key_path, seal
from runtimes.strict_json import load_json

__all__ = ["FOLDER", "PLUGINS", "TIMING_CACHE", "Machine", "WrongEngine", "check", "key_path", "read", "store"]

FOLDER = "engines"
PLUGINS, TIMING_CACHE = f"{FOLDER}/libedge_plugins.so", f"{FOLDER}/timing.cache"
SCHEMA = 1
MAX_SIDECAR_BYTES = 1 << 16
_AGAIN = "Run python -m runtimes.finalize BUNDLE on this machine"
_ANOTHER = "Build a bundle for this device's profile"


class WrongEngine(Fault):
    """An engine that this machine did not build, or not from this bundle; it is not deserialised."""


@dataclass(frozen=True)
class Machine:
    """What an engine belongs to: compiler ("TensorRT 10.3.0"), compute capability, GPU, newest CUDA of the driver,
    operating system and architecture."""

    compiler: str
    sm: str
    gpu: str
    uuid: str
    cuda: str
    system: str


def this_system() -> str:
    """Operating system and architecture, as in "linux aarch64"."""
    names = {"amd64": "x86_64", "arm64": "aarch64"}
    machine = platform.machine().lower()
    return f"{platform.system().lower()} {names.get(machine, machine)}"


def name_of(artifact: Artifact) -> str:
    """The name of an artifact's engine and of its sidecar."""
    return f"{artifact.component}.{artifact.form}.{artifact.mode}"


def engine_path(bundle: Bundle, artifact: Artifact) -> Path:
    """Where the engine lies that this machine builds."""
    return bundle.folder / FOLDER / f"{name_of(artifact)}.engine"


def sidecar_path(bundle: Bundle, artifact: Artifact) -> Path:
    """Where its sidecar lies."""
    return bundle.folder / FOLDER / f"{name_of(artifact)}.json"


def held(bundle: Bundle, artifact: Artifact) -> bool:
    """Whether there is an engine of the artifact, right or wrong."""
    return any(os.path.lexists(path) for path in (engine_path(bundle, artifact), sidecar_path(bundle, artifact)))


def source(bundle: Bundle, artifact: Artifact) -> str:
    """One hash over everything of the bundle that the artifact's engine is made of."""
    digest = hashlib.sha256(json.dumps(artifact.options.get("ranges"), sort_keys=True).encode())
    shared = [path for path in bundle.files if path.startswith(("tensorrt/kernels/", "tensorrt/plugin/"))]
    for path in sorted({*artifact.files, *(shared if artifact.options.get("plugins") else ())}):
        digest.update(f"{path}\0{bundle.files[path].sha256}\n".encode())
    return digest.hexdigest()


def store(bundle: Bundle, artifact: Artifact, engine: bytes, machine: Machine, packaging: str = "none") -> Path:
    """Writes engine and sidecar, each whole or not at all; the sidecar last, so that without it there is no engine."""
    path, sidecar = engine_path(bundle, artifact), sidecar_path(bundle, artifact)
    with storage_errors(path):
        path.parent.mkdir(exist_ok=True)
        sidecar.unlink(missing_ok=True)
        write_durably(path, engine)
        built = {
            **asdict(machine),
            "schema": SCHEMA,
            "engine": hashlib.sha256(engine).hexdigest(),
            "size": len(engine),
            "source": source(bundle, artifact),
            "packaging": packaging,
            "plugins": _hash(bundle.folder / PLUGINS) if packaging == "library" else "",
            "timings": _hash(bundle.folder / TIMING_CACHE),
            "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        content = {"built": built, "seal": seal(_text(built))}
        write_durably(sidecar, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
    return path


def check(bundle: Bundle, artifact: Artifact, machine: Machine) -> Path:
    """The path of the artifact's engine, if it belongs to this machine and bundle and not a bit of it has changed.

    Raises:
        WrongEngine: naming what differs.
    """
    path, expected = _expected(bundle, artifact, machine)
    if _hash(path) != expected:
        raise _changed(path)
    return path


def read(bundle: Bundle, artifact: Artifact, machine: Machine) -> bytes:
    """The engine's bytes, after the checks of `check` on these very bytes. Raises WrongEngine."""
    path, expected = _expected(bundle, artifact, machine)
    try:
        with open(open_plain(path), "rb") as file:
            engine = file.read()
    except (OSError, BundleError) as error:
        raise WrongEngine(f"cannot be read ({error})", str(path), _AGAIN) from error
    if hashlib.sha256(engine).hexdigest() != expected:
        raise _changed(path)
    return engine


def packaging_of(bundle: Bundle, artifact: Artifact) -> str:
    """How the plugins came that the engine was built with: "ahead-of-time", "library" or "none"."""
    return str(_authentic(sidecar_path(bundle, artifact)).get("packaging", "none"))


def discard_foreign(bundle: Bundle) -> list[str]:
    """Removes plugin library and timing cache where no sidecar of this machine names their hash: both are read by
    native code, and no manifest vouches for them. Returns what was removed."""
    vouched: dict[str, set[str]] = {PLUGINS: set(), TIMING_CACHE: set()}
    for artifact in bundle.artifacts:
        try:
            built = _authentic(sidecar_path(bundle, artifact))
        except WrongEngine:
            continue
        vouched[PLUGINS].add(str(built.get("plugins")))
        vouched[TIMING_CACHE].add(str(built.get("timings")))
    removed = []
    for name, hashes in vouched.items():
        path = bundle.folder / name
        try:
            foreign = os.path.lexists(path) and _hash(path) not in hashes
        except WrongEngine:  # no plain file
            foreign = True
        if foreign:
            with storage_errors(path):
                path.unlink()
            removed.append(name)
    return removed


def sweep(folder: Path) -> None:
    """Removes what a killed run has left below a bundle's engines: half-written files, and the compiler's scratch."""
    engines = folder / FOLDER
    if engines.is_symlink() or not engines.is_dir():
        return
    with storage_errors(engines):
        for path in engines.iterdir():
            if path.name.startswith(".build-") and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name.startswith(".") and path.name.endswith(".new"):
                path.unlink()


def _expected(bundle: Bundle, artifact: Artifact, machine: Machine) -> tuple[Path, str]:
    """Where the engine lies and the SHA-256 that it must have. Raises WrongEngine where all the rest does not fit."""
    if "engine" in artifact.options:
        return _of_the_bundle(bundle, artifact, machine)
    path, sidecar = engine_path(bundle, artifact), sidecar_path(bundle, artifact)
    built = _authentic(sidecar)
    for field, here in asdict(machine).items():
        if built.get(field) != here:
            raise WrongEngine(f"was built for {field} {built.get(field)}, this machine has {here}", str(path), _AGAIN)
    if built.get("source") != source(bundle, artifact):
        raise WrongEngine("was built from another version of the bundle", str(path), _AGAIN)
    if not path.is_file() or path.is_symlink():
        raise WrongEngine("is missing or not a plain file", str(path), _AGAIN)
    if built.get("packaging") == "library" and _hash(bundle.folder / PLUGINS) != built.get("plugins"):
        raise WrongEngine("was built with other plugins than those that are there", str(path), _AGAIN)
    return path, str(built.get("engine"))


def _of_the_bundle(bundle: Bundle, artifact: Artifact, machine: Machine) -> tuple[Path, str]:
    """The same of an engine that the build machine made: the manifest holds its hash, the options what it is for."""
    name, where = str(artifact.options["engine"]), f"{artifact.component} ({artifact.label})"
    if name not in artifact.files or name not in bundle.files:
        raise WrongEngine(f"{name!r} is not one of the artifact's files", where, "Fetch or build the bundle again")
    compiler = str((artifact.options.get("compiled") or {}).get("compiler", "an unknown compiler"))
    rows = (("sm", artifact.options.get("sm"), machine.sm), ("compiler", compiler, machine.compiler))
    for field, made, here in rows:
        if made != here:
            raise WrongEngine(
                f"was built for {field} {made}, this machine has {here}", str(bundle.file(name)), _ANOTHER
            )
    return bundle.file(name), bundle.files[name].sha256


def _changed(path: Path) -> WrongEngine:
    names = "its sidecar or the manifest names"
    return WrongEngine(f"does not have the SHA-256 that {names}", str(path), _AGAIN)


def _authentic(sidecar: Path) -> Mapping[str, Any]:
    """What a sidecar says, if this machine sealed it."""
    try:
        with open(open_plain(sidecar), "rb") as file:
            data = file.read(MAX_SIDECAR_BYTES + 1)
        if len(data) > MAX_SIDECAR_BYTES:
            raise ValueError(f"larger than {MAX_SIDECAR_BYTES} bytes")
        content = load_json(data, sidecar.name)
        built, code = dict(content["built"]), str(content["seal"])
        text = _text(built)
    except FileNotFoundError as error:
        raise WrongEngine("has no sidecar, so nobody knows where its engine is from", str(sidecar), _AGAIN) from error
    except (OSError, ValueError, KeyError, TypeError, BundleError) as error:
        raise WrongEngine(f"is not a sidecar ({error})", str(sidecar), _AGAIN) from error
    if not is_sealed(text, code):
        raise WrongEngine("was not sealed by this machine: its engine is from elsewhere", str(sidecar), _AGAIN)
    if built.get("schema") != SCHEMA:
        raise WrongEngine(f"has schema {built.get('schema')}, this version writes {SCHEMA}", str(sidecar), _AGAIN)
    return built


def _text(built: Mapping[str, Any]) -> bytes:
    return json.dumps(built, sort_keys=True, separators=(",", ":")).encode()


def _hash(path: Path) -> str:
    """SHA-256 of a plain file; "" where there is none. Raises WrongEngine for what cannot be read."""
    try:
        return hash_file(path).sha256
    except FileNotFoundError:
        return ""
    except (OSError, BundleError) as error:
        raise WrongEngine(f"cannot be read ({error})", str(path), _AGAIN) from error
