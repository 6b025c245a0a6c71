"""Changes to a copy of a bundle that leave it consistent: hashes are made again, so only the content is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from runtimes.bundle import Bundle, load_bundle, write_manifest


def copy_bundle(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    for report in ("report.json", "report.md"):
        (target / report).unlink(missing_ok=True)
    return target


def edit_golden(folder: Path, component: str, edit: Callable[[dict[str, np.ndarray]], object]) -> Bundle:
    """Rewrites a component's golden file after `edit` has changed its tensors in place."""
    path = folder / load_bundle(folder).golden[component]
    tensors = {name: tensor.copy() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)
    return edit_fields(folder, lambda fields: None)


def edit_fields(folder: Path, edit: Callable[[dict[str, Any]], object]) -> Bundle:
    """Rewrites the manifest after `edit` has changed its fields in place."""
    fields = json.loads((folder / "manifest.json").read_text())
    edit(fields)
    return write_manifest(folder, {key: value for key, value in fields.items() if key not in ("files", "schema")})
