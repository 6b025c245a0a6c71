"""Where compiled kernels are kept between builds: the user's cache folder, by a hash over all that they are of."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """Below $XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "edge-export" / "kernels"


def kept(key: str, make: Callable[[], bytes]) -> bytes:
    """The bytes kept under ``key``, made and kept where there are none; a crash leaves nothing half-written."""
    path = cache_folder() / key
    if not path.exists():
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(made)
        os.replace(file.name, path)
    return path.read_bytes()
