"""Whether this machine is the device of a profile: what runs anywhere else is a proxy, whoever starts it."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtimes.host import cpu_model, read_text

HOST = "host"
_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}
# What a profile's `device` adds to the product's name.
_MEMORY = re.compile(r"\s+\d+\s?GB\b")


def stand_in(profile: Mapping[str, Any]) -> str | None:
    """None where this machine is the profile's device, else what it is, for the rows that are then proxies.

    A bundle for `host` belongs to the processor that it was built on; every other device is known by its product's
    name or its chip in the names that processor, board and GPU give themselves.
    """
    names = machine_names()
    here = f"{names[0]}, not {profile['device'] if profile['name'] != HOST else profile['soc']}"
    if profile["name"] == HOST:
        return None if profile["soc"] == names[0] else here
    architecture = platform.machine().lower()
    if _ARCHITECTURES.get(architecture, architecture) != profile["arch"]:
        return here
    wanted = [_MEMORY.split(profile["device"])[0], *(profile["soc"] or "").split(",")[:1]]
    found = any(_plain(name) in _plain(own) for name in wanted if name for own in names)
    return None if found else here


def machine_names() -> tuple[str, ...]:
    """The names of this machine: its processor first, then its board and its NVIDIA GPUs where there are any."""
    board = read_text(Path("/proc/device-tree/model"))
    return tuple(name for name in (cpu_model(), board, *_gpus()) if name)


def _gpus() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    return done.stdout.splitlines() if done.returncode == 0 else []


def _plain(name: str) -> str:
    """Lower case, without trade marks and with single spaces."""
    return " ".join(re.sub(r"\((r|tm)\)|[®™]", " ", name.lower()).split())
