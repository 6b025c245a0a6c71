"""The machine that a measurement ran on: what it is, and whether a figure from it may be used.

Everything is read from the system, and is null where the system does not tell.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

_CPU = Path("/sys/devices/system/cpu")
#: How long nvpmodel may take to answer.
NVPMODEL_SECONDS = 10.0
# Bits 0-3 of the value are what is throttled now (Raspberry Pi firmware).
_PI_THROTTLED = Path("/sys/devices/platform/soc/soc:firmware/get_throttled")
IDLE_CORES = 0.2
PACKAGES = ("numpy", "onnxruntime", "openvino", "apache-tvm", "tensorrt_rtx", "torch", "tokenizers", "edge-export")


def read_text(path: Path) -> str | None:
    """A small system file's text, None where it is not there or not readable."""
    try:
        return path.read_text(errors="replace").strip("\0\n ")
    except OSError:
        return None


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    for line in (read_text(Path("/proc/cpuinfo")) or "").splitlines():
        if line.lower().startswith(("model name", "hardware")):
            return line.split(":", 1)[1].strip()
    board = read_text(Path("/proc/device-tree/model"))
    return board or platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def last_level_cache_bytes() -> int | None:
    """Size of the largest cache of core 0."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [read_text(path) for path in _CPU.glob("cpu0/cache/index*/size")]
    found = [int(size[:-1]) * units[size[-1]] for size in sizes if size and size[-1] in units and size[:-1].isdigit()]
    return max(found, default=None)


def memory_bytes() -> int | None:
    """Memory of the machine, None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, AttributeError):
        return None


def peak_rss_bytes() -> int:
    """The most memory that this process has held.

    Linux: VmHWM of /proc, for ru_maxrss of a fresh process begins at what its parent held.
    """
    for line in (read_text(Path("/proc/self/status")) or "").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak << 10


def rss_bytes() -> int | None:
    """The memory that this process holds now; None where the system does not tell."""
    text = read_text(Path("/proc/self/statm"))
    return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE") if text else None


def _integer(path: Path) -> int | None:
    text = read_text(path)
    return int(text) if text and text.isdigit() else None


def frequency_khz() -> int | None:
    """The clock of core 0 now; None where the system does not tell."""
    return _integer(_CPU / "cpu0/cpufreq/scaling_cur_freq")


def power_mode() -> str | None:
    """A Jetson's power mode by name (numbers differ by board); None on other machines and where it cannot be
    known."""
    tool = shutil.which("nvpmodel")
    if tool is None:
        return None
    try:
        reply = subprocess.run(
            [tool, "-q"], capture_output=True, text=True, timeout=NVPMODEL_SECONDS, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):  # it is there and does not answer: the mode is not known
        return None
    return next((line.split(":", 1)[1].strip() for line in reply.splitlines() if "Power Mode:" in line), None)


def environment() -> dict[str, Any]:
    """What a result was made on: processor, system, clocks and versions."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "governor": read_text(_CPU / "cpu0/cpufreq/scaling_governor"),
        "max_frequency_khz": _integer(_CPU / "cpu0/cpufreq/scaling_max_freq"),
        "power_mode": power_mode(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
    }


def _busy_seconds() -> float | None:
    """Processor time that the whole machine has spent (stolen time included); None where the system does not tell."""
    first = (read_text(Path("/proc/stat")) or "").split("\n", 1)[0].split()
    if first[:1] != ["cpu"]:
        return None
    # user nice system idle iowait irq softirq steal (proc(5)): all but the two kinds of idling
    ticks = [int(value) for value in first[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Conditions:
    """What could spoil a timing, read before and after it: the clock, processor time of this process and of the whole
    machine (seconds; None where the system does not tell), the load over a minute, the count of thermal throttling
    events, and whether the board says that it throttles now."""

    time: float
    own_seconds: float
    busy_seconds: float | None
    load: float | None
    throttle_events: int
    throttled: bool

    @classmethod
    def now(cls) -> Conditions:
        events = [read_text(path) for path in _CPU.glob("cpu*/thermal_throttle/*_throttle_count")]
        board = read_text(_PI_THROTTLED)
        return cls(
            time=time.monotonic(),
            own_seconds=time.process_time(),
            busy_seconds=_busy_seconds(),
            load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            throttle_events=sum(int(count) for count in events if count and count.isdigit()),
            throttled=bool(board and int(board, 16) & 0xF),
        )


def cores_of_others(before: Conditions, after: Conditions) -> float | None:
    """How many cores other processes kept busy between two readings: measured where the machine's processor time is
    known, else the load at the start (which still holds what this process's own past has left in it)."""
    if before.busy_seconds is None or after.busy_seconds is None:
        return before.load
    spent = (after.busy_seconds - before.busy_seconds) - (after.own_seconds - before.own_seconds)
    return max(0.0, spent) / (after.time - before.time)


def why_invalid(before: Conditions, after: Conditions, threads: int) -> str:
    """Why a timing between the two readings is no figure to use; "" when nothing speaks against it.

    Busy: the others use more than the cores that the run's threads leave them (IDLE_CORES is what a system at rest
    may use beside that).
    """
    reasons = []
    others, cores = cores_of_others(before, after), os.cpu_count() or 1
    if others is not None and others > max(cores - threads, 0) + IDLE_CORES:
        reasons.append(f"busy: others use {others:.1f} of {cores} cores beside {threads} thread(s)")
    if after.throttle_events > before.throttle_events or before.throttled or after.throttled:
        reasons.append("throttled")
    return "; ".join(reasons)
