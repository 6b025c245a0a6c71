"""What this machine is, for the keys that host.toml lists under `detected`. Nothing is measured here."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from device_profiles.schema import ARCHES, ProfileError

_ARCH = {"amd64": "x86_64", "x86_64": "x86_64", "arm64": "aarch64", "aarch64": "aarch64"}
_SYSTEM = {"Linux": "linux", "Darwin": "macos", "Windows": "windows"}
# What /proc/cpuinfo calls an extension -> the name it has in profiles.
_LINUX_FLAGS: Mapping[str, Mapping[str, str]] = {
    "x86_64": {
        name: name
        for name in (
            "sse4_2",
            "avx",
            "f16c",
            "fma",
            "avx2",
            "avx_vnni",
            "avx_vnni_int8",
            "avx512f",
            "avx512bw",
            "avx512_vnni",
            "avx512_bf16",
            "avx512_fp16",
            "amx_int8",
            "amx_bf16",
        )
    },
    "aarch64": {
        "asimd": "neon",
        "asimdhp": "fp16",
        "asimddp": "dotprod",
        "i8mm": "i8mm",
        "bf16": "bf16",
        "sve": "sve",
        "sve2": "sve2",
        "sme": "sme",
    },
}
_MACOS_FLAGS = {
    "hw.optional.neon": "neon",
    "hw.optional.arm.FEAT_FP16": "fp16",
    "hw.optional.arm.FEAT_DotProd": "dotprod",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_SME": "sme",
    "hw.optional.avx2_0": "avx2",
    "hw.optional.fma": "fma",
    "hw.optional.f16c": "f16c",
}
# The best extension for int8 dot products first.
_INT8_ORDER = ("amx_int8", "avx512_vnni", "avx_vnni_int8", "avx_vnni", "i8mm", "dotprod", "avx2", "neon")
_MEMORY = Path("/sys/devices/system/memory")
#: Budget of a process where the memory cannot be found out; half of the memory where it can.
DEFAULT_RSS = 1 << 30


def detect() -> tuple[dict[str, Any], dict[str, str]]:
    """(key -> value or None, key -> source) for every key that can be found out without measuring.

    Raises ProfileError on an operating system or an architecture that no profile knows.
    """
    system = _SYSTEM.get(platform.system())
    arch = _ARCH.get(platform.machine().lower())
    if system is None or arch is None:
        what = f"{platform.system()} on {platform.machine()} is not known"
        raise ProfileError(what, "host.toml", f"Known: Linux, macOS or Windows on {', '.join(ARCHES[:2])}.")
    cpuinfo = Path("/proc/cpuinfo").read_text(errors="replace") if system == "linux" else ""
    isa = _isa(system, arch, cpuinfo)
    nominal, visible = _memory(system)
    values: dict[str, Any] = {
        "soc": _soc(system, cpuinfo),
        "arch": arch,
        "isa": isa,
        "int8_isa": next((flag for flag in _INT8_ORDER if flag in (isa or ())), None),
        "memory_bytes": nominal,
        "memory_visible_bytes": visible,
        "rss_bytes": DEFAULT_RSS if visible is None else visible // 2,
        "os": system,
        "stack": f"{platform.system()} {platform.release()}",
        "onnxruntime_version": _installed("onnxruntime"),
        "openvino_version": _installed("openvino"),
        "tvm_version": _installed("apache-tvm"),
        "tvm_target": json.dumps({"kind": "llvm", "num-cores": os.cpu_count() or 1}),
    }
    return values, dict.fromkeys(values, "detected on this machine")


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _sysctl(name: str) -> str | None:
    done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False, timeout=10)
    return done.stdout.strip() or None if done.returncode == 0 else None


def _soc(system: str, cpuinfo: str) -> str | None:
    if system == "macos":
        return _sysctl("machdep.cpu.brand_string")
    for name in ("model name", "Model", "Hardware"):
        if match := re.search(rf"^{name}\s*:\s*(.+)$", cpuinfo, re.MULTILINE):
            return match[1].strip()
    return platform.processor() or None


def _isa(system: str, arch: str, cpuinfo: str) -> tuple[str, ...] | None:
    """Extensions in a fixed order, or None where the system does not tell."""
    if system == "macos":
        return tuple(flag for key, flag in _MACOS_FLAGS.items() if _sysctl(key) == "1")
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    if match is None:
        return None
    there = set(match[1].split())
    return tuple(name for flag, name in _LINUX_FLAGS[arch].items() if flag in there)


def _memory(system: str) -> tuple[int | None, int | None]:
    """(nominal bytes, bytes that programs can see: what the kernel manages, or the control group's limit)."""
    if system == "macos":
        size = _sysctl("hw.memsize")
        return (int(size), int(size)) if size else (None, None)
    if system != "linux":
        return None, None
    total = re.search(r"^MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    visible = int(total[1]) * 1024 if total else None
    limit = _cgroup_limit()
    if visible is not None and limit is not None:
        visible = min(visible, limit)
    return _memory_blocks(), visible


def _memory_blocks() -> int | None:
    """Online memory blocks times their size (Linux, Documentation/admin-guide/mm/memory-hotplug.rst)."""
    try:
        size = int((_MEMORY / "block_size_bytes").read_text(), 16)
        states = [(block / "state").read_text().strip() for block in _MEMORY.glob("memory[0-9]*")]
    except (OSError, ValueError):
        return None  # not every kernel has memory blocks
    return states.count("online") * size or None


def _cgroup_limit() -> int | None:
    """The tightest memory limit of this process's control group, version 1 or 2."""
    limits = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            file = Path("/sys/fs/cgroup") / path.lstrip("/") / "memory.max"
        elif "memory" in controllers.split(","):
            file = Path("/sys/fs/cgroup/memory") / path.lstrip("/") / "memory.limit_in_bytes"
        else:
            continue
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits, default=None)
