"""Opens, checks and publishes bundles. Standard library only.

A bundle is a folder: manifest.json and the files that it names, each with its size and SHA-256. `load_bundle` checks
the manifest; `Bundle.verify` hashes every file against it. A builder works in `staged(output)`, writes its files,
calls `write_manifest` last, and on leaving the block the folder takes the output's place in one step
(runtimes/publish.py holds the crash rule).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from runtimes.files import (
    Progress,
    half_written,
    hash_file,
    open_plain,
    quiet,
    scan,
    storage_errors,
    sync_tree,
    write_durably,
)
from runtimes.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_SIGNATURE_BYTES,
    SCHEMA,
    SIGNATURE,
    Artifact,
    BundleError,
    FileInfo,
    Manifest,
    Modality,
    SpecialTokens,
    StateSpec,
    StudentInfo,
    TensorSpec,
    Tolerance,
    UnsafeBundlePath,
    comparable,
    dump_manifest,
    safe_path,
)
from runtimes.manifest_json import parse_manifest
from runtimes.publish import BundleBusy, recover, staged
from runtimes.strict_json import load_json

__all__ = [
    "MANIFEST",
    "SCHEMA",
    "Artifact",
    "Bundle",
    "BundleBusy",
    "BundleError",
    "FileInfo",
    "Manifest",
    "Modality",
    "SpecialTokens",
    "StateSpec",
    "StudentInfo",
    "TensorSpec",
    "Tolerance",
    "UnsafeBundlePath",
    "comparable",
    "load_bundle",
    "publish",
    "read_manifest",
    "staged",
    "write_manifest",
]

FETCH = "Fetch or build the bundle again."
GIVE = "Give the folder that exporters.build made."


@dataclass(frozen=True)
class Bundle(Manifest):
    """An opened bundle: the manifest's fields and the folder that they describe."""

    folder: Path

    def file(self, path: str) -> Path:
        """The absolute path of a file of the bundle, given as the manifest writes it."""
        if path not in self.files and path not in self.mutable:
            raise BundleError(f"{path!r} is not a file of this bundle", str(self.folder), f"See its {MANIFEST}.")
        return self.folder / path

    def artifact(
        self, component: str, backend: str | None = None, form: str | None = None, mode: str | None = None
    ) -> Artifact:
        """The preferred artifact of a component, or the first one of the given backend, form and mode."""
        held = [a for a in self.artifacts if a.component == component]
        wanted = {"backend": backend, "form": form, "mode": mode}
        given = {key: value for key, value in wanted.items() if value is not None}
        found = [a for a in held if (all(getattr(a, k) == v for k, v in given.items()) if given else a.preferred)]
        if not found:
            asked = " ".join(f"{key}={value}" for key, value in given.items()) or "preferred"
            there = ", ".join(a.label for a in held) or "no artifact of that component"
            raise BundleError(f"no {asked} artifact for {component}", str(self.folder), f"The bundle holds: {there}.")
        return found[0]

    def verify(self, progress: Progress = quiet) -> None:
        """Hashes every file. Raises BundleError for a file that is missing, changed, a link, or not in the manifest."""
        with storage_errors(self.folder):
            found = scan(self.folder)
            # What a killed command has left of a report is nobody's, but it says nothing against the bundle.
            left = (half_written(PurePosixPath(path)).as_posix() for path in self.mutable)
            known = {MANIFEST, SIGNATURE, *self.files, *self.mutable, *left}
            for path in found:
                if path not in known:
                    raise BundleError("is not in the manifest", str(self.folder / path), f"Remove it, or: {FETCH}")
            if found.get(SIGNATURE, 0) > MAX_SIGNATURE_BYTES:
                raise BundleError(f"is larger than {MAX_SIGNATURE_BYTES} bytes", str(self.folder / SIGNATURE), FETCH)
            for path, expected in self.files.items():
                if path not in found:
                    raise BundleError("is missing", str(self.folder / path), FETCH)
                if found[path] != expected.size:
                    sizes = f"{found[path]} bytes instead of {expected.size}"
                    raise BundleError(f"has {sizes}", str(self.folder / path), FETCH)
                if hash_file(self.folder / path, progress) != expected:
                    raise BundleError("does not have the manifest's SHA-256", str(self.folder / path), FETCH)


def read_manifest(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a bundle folder's manifest, not looked at yet. Raises BundleError when there is no such folder."""
    folder = Path(path)
    recover(folder)
    manifest = folder / MANIFEST
    if not folder.is_dir():
        state = "is not a folder (an archive is opened by runtimes.archive)" if folder.exists() else "does not exist"
        raise BundleError(state, str(folder), GIVE)
    if not manifest.exists() and not manifest.is_symlink():
        raise BundleError(f"has no {MANIFEST}, so it is not a bundle", str(folder), GIVE)
    with storage_errors(manifest), open(open_plain(manifest), "rb") as file:
        data = file.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"is larger than {MAX_MANIFEST_BYTES} bytes", str(manifest), FETCH)
    return data


def load_bundle(path: str | os.PathLike[str], manifest: bytes | None = None) -> Bundle:
    """Opens a bundle folder and checks its manifest (not the files' contents: `Bundle.verify` does).

    `manifest`: what `read_manifest` gave, where its signature was checked; the file is then not read a second time.
    Raises BundleError naming the file or field.
    """
    folder = Path(path)
    data = read_manifest(folder) if manifest is None else manifest
    try:
        parsed = parse_manifest(load_json(data, MANIFEST))
    except BundleError as error:
        raise type(error)(error.what, f"{folder / MANIFEST}: {error.where}", error.way_out) from error
    return Bundle(**vars(parsed), folder=folder)


def write_manifest(folder: Path, manifest: Mapping[str, Any], progress: Progress = quiet) -> Bundle:
    """Finishes a bundle: syncs and hashes its files into `files`, checks the manifest, and writes it last.

    `manifest` holds every field but `schema` and `files`. Paths in `mutable` (reports) are not hashed, and need not be
    there yet. Files written after this call, but for those, make `verify` fail.
    """
    mutable = {safe_path(path, "mutable") for path in manifest.get("mutable", ())}
    with storage_errors(folder):
        for stale in (MANIFEST, SIGNATURE):
            (folder / stale).unlink(missing_ok=True)
        sync_tree(folder, progress)
        files = {path: hash_file(folder / path, progress) for path in scan(folder) if path not in mutable}
        complete = {**manifest, "schema": SCHEMA, "files": {path: vars(info) for path, info in files.items()}}
        parse_manifest(complete)
        progress("manifest", 0)
        write_durably(folder / MANIFEST, dump_manifest(complete))
    return load_bundle(folder)


def publish(
    folder: Path, output: str | os.PathLike[str], *, allow_downgrade: bool = False, progress: Progress = quiet
) -> Bundle:
    """Publishes a finished bundle folder, which may lie on another file system: it is checked, then copied."""
    bundle = load_bundle(folder)
    bundle.verify(progress)
    with staged(output, allow_downgrade=allow_downgrade, progress=progress) as stage, storage_errors(stage):
        # The manifest last, as everywhere: a folder with a manifest is a whole bundle.
        for path in sorted(scan(folder), key=lambda path: path == MANIFEST):
            (stage / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / path, stage / path, follow_symlinks=False)
    return load_bundle(output)
