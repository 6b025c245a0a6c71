"""Engines that were built on this machine: where they lie, what they were built from, and why one is refused.

An engine belongs to one GPU, TensorRT version and system, and deserialising it runs what is in it. So each has a
sidecar, engines/<name>.json, that names all of this and is authenticated by a key that never leaves the machine:

    {"built": {"engine": sha256, "model": sha256, "compiler": ..., "sm": ..., "gpu": ..., "uuid": ..., "cuda": ...,
               "system": ..., "packaging": ..., "plugins": sha256 or "", "kernels": sha256 or ""}, "seal": HMAC-SHA256}

`check` holds sidecar, engine and machine against each other before anything is deserialised.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import platform
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtimes.bundle import Artifact, Bundle
from runtimes.errors import Fault
from runtimes.files import hash_file, storage_errors, write_durably

FOLDER = "engines"
PLUGINS, TIMING_CACHE = f"{FOLDER}/libedge_plugins.so", f"{FOLDER}/timing.cache"
_KEY_BYTES = 32
_AGAIN = "Run python -m runtimes.finalize BUNDLE on this machine"


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
    return engine_path(bundle, artifact).exists() or sidecar_path(bundle, artifact).exists()


def source(bundle: Bundle, artifact: Artifact) -> str:
    """One hash over everything of the bundle that the artifact's engine is made of."""
    digest = hashlib.sha256()
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
            "engine": hash_file(path).sha256,
            "source": source(bundle, artifact),
            "packaging": packaging,
            "plugins": _hash(bundle.folder / PLUGINS) if packaging == "library" else "",
        }
        content = {"built": built, "seal": _seal(built, _key(make=True))}
        write_durably(sidecar, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
    return path


def check(bundle: Bundle, artifact: Artifact, machine: Machine) -> Path:
    """The engine's path, if this machine built it, from this bundle, and not a bit has changed since.

    Raises:
        WrongEngine: naming what differs.
    """
    path, sidecar = engine_path(bundle, artifact), sidecar_path(bundle, artifact)
    built = _authentic(sidecar)
    for field, here in asdict(machine).items():
        if built.get(field) != here:
            raise WrongEngine(f"was built for {field} {built.get(field)}, this machine has {here}", str(path), _AGAIN)
    if built.get("source") != source(bundle, artifact):
        raise WrongEngine("was built from another version of the bundle", str(path), _AGAIN)
    if not path.is_file() or path.is_symlink():
        raise WrongEngine("is missing or not a plain file", str(path), _AGAIN)
    if _hash(path) != built.get("engine"):
        raise WrongEngine("does not have the SHA-256 that its sidecar names", str(path), _AGAIN)
    if built.get("packaging") == "library" and _hash(bundle.folder / PLUGINS) != built.get("plugins"):
        raise WrongEngine("was built with other plugins than those that are there", str(path), _AGAIN)
    return path


def packaging_of(bundle: Bundle, artifact: Artifact) -> str:
    """How the plugins came that the engine was built with: "ahead-of-time", "library" or "none"."""
    return str(_authentic(sidecar_path(bundle, artifact)).get("packaging", "none"))


def _authentic(sidecar: Path) -> Mapping[str, Any]:
    """What a sidecar says, if this machine sealed it."""
    try:
        content = json.loads(sidecar.read_bytes())
        built, seal = dict(content["built"]), str(content["seal"])
    except FileNotFoundError as error:
        raise WrongEngine("has no sidecar, so nobody knows where its engine is from", str(sidecar), _AGAIN) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WrongEngine(f"is not a sidecar ({error})", str(sidecar), _AGAIN) from error
    key = _key(make=False)
    if key is None or not hmac.compare_digest(seal, _seal(built, key)):
        raise WrongEngine("was not sealed by this machine: its engine is from elsewhere", str(sidecar), _AGAIN)
    return built


def _seal(built: Mapping[str, Any], key: bytes | None) -> str:
    text = json.dumps(built, sort_keys=True, separators=(",", ":")).encode()
    return hmac.new(key or b"", text, hashlib.sha256).hexdigest()


def key_path() -> Path:
    """The machine's own key: below $XDG_STATE_HOME, or ~/.local/state (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "edge-export" / "engine.key"


def _key(make: bool) -> bytes | None:
    """The key; None where there is none and none is to be made. Only its owner can read it."""
    path = key_path()
    if make and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
        except FileExistsError:  # another process made it first
            pass
    try:
        key = path.read_bytes()
    except OSError:
        return None
    return key if len(key) == _KEY_BYTES else None


def _hash(path: Path) -> str:
    try:
        return hash_file(path).sha256
    except OSError as error:
        raise WrongEngine(f"cannot be read ({error.strerror})", str(path), _AGAIN) from error
