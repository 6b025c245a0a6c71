"""The files of kernels/cuda that a bundle takes along, for the device to build the plugin library from."""

from __future__ import annotations

import re
from pathlib import Path

from exporters.cuda_kernels import SOURCES

#: Where the walk begins: what is compiled, and what compiles it.
_ROOTS = ("CMakeLists.txt", "library/*.cpp", "tensorrt/*.cpp")


def plugin_sources() -> dict[str, Path]:
    """Path below tensorrt/plugin/ -> file: the libraries' sources and every header of ours that these include."""
    found: dict[str, Path] = {}
    waiting = [path for root in _ROOTS for path in SOURCES.glob(root)]
    while waiting:
        path = waiting.pop().resolve()
        name = path.relative_to(SOURCES.resolve()).as_posix()
        if name not in found:
            found[name] = path
            waiting += [path.parent / included for included in re.findall(r'^#include "(.+)"', path.read_text(), re.M)]
    return dict(sorted(found.items()))
