"""Whether a device is in the state that its profile's figures are for. Nothing here changes that state.

Power modes are compared by name, since their numbers differ by board; clocks are steady where `jetson_clocks` has set
each lowest frequency to the highest one (NVIDIA Jetson Linux Developer Guide, "Power and performance"). That tool shows
clocks to root alone, so where it does not answer, the same limits are read from sysfs.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtimes.host import power_mode, read_text

# "cpu0: Online=1 ... MinFreq=729600 MaxFreq=2201600 ...", "GPU MinFreq=306000000 MaxFreq=1300500000 ..."; a core that
# is off has no clock, and "EMC ... FreqOverride=1" is locked by that. The lines of DLA and PVA have MinFreq=0 always.
_CLOCK = re.compile(
    r"^\s*(cpu\d+|GPU|EMC|[\w.-]*(?:gpu|ga10b|gpc|bwmgr)[\w.-]*):?\s"
    r"(?!.*Online=0)(?!.*FreqOverride=1).*?MinFreq=(\d+)\s+MaxFreq=(\d+)",
    re.MULTILINE,
)
#: devfreq devices whose clock counts: the GPU as Orin (17000000.gpu, 17000000.ga10b) and Thor (gpu-gpc-0) name it, and
#: Thor's memory. Orin's memory is seen by root alone.
_DEVFREQ = re.compile(r".*\.gpu|.*\.ga10b|gpu-gpc-\d+|bwmgr")
_SYSFS = Path("/sys")
_SECONDS = 20


def why_not_timed(profile: Mapping[str, Any]) -> str:
    """Why a timing taken now would not be the profile's; "" when nothing speaks against it."""
    return reasons(profile.get("power_mode"), power_mode(), clocks())


def reasons(wanted: str | None, mode: str | None, shown: str | None) -> str:
    """The same from what was asked for and seen.

    Args:
        wanted: the profile's power mode, None where it has none.
        mode: the device's, None where there is no nvpmodel, or it does not answer.
        shown: the clocks as `jetson_clocks --show` prints them, None where they cannot be known.
    """
    found = []
    if wanted is not None and mode is None:
        found.append(f"power mode is unknown (nvpmodel -q does not say), the profile's is {wanted}")
    elif wanted is not None and mode is not None and mode.removeprefix("MODE_") != wanted.removeprefix("MODE_"):
        found.append(f"power mode is {mode}, the profile's is {wanted}: sudo nvpmodel -m <number of {wanted}>")
    loose = [name for name, low, high in _CLOCK.findall(shown or "") if low != high]
    if loose:
        found.append(f"clocks of {', '.join(loose)} are not locked: sudo jetson_clocks")
    return "; ".join(found)


def clocks() -> str | None:
    """What `jetson_clocks --show` prints, or the same lines from sysfs; None on a machine that has no such tool."""
    tool = shutil.which("jetson_clocks")
    if tool is None:
        return None
    try:
        done = subprocess.run([tool, "--show"], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return clocks_of(_SYSFS)
    return done.stdout if done.returncode == 0 and _CLOCK.search(done.stdout) else clocks_of(_SYSFS)


def clocks_of(sysfs: Path) -> str | None:
    """Lines as `jetson_clocks --show` has them, of cores (kHz), GPU and memory (Hz); None where there are none.

    A core that is off has no cpufreq folder.
    """
    cores = [(path.parent.name, path, "scaling_") for path in sysfs.glob("devices/system/cpu/cpu[0-9]*/cpufreq")]
    others = [(path.name, path, "") for path in sysfs.glob("class/devfreq/*") if _DEVFREQ.fullmatch(path.name)]
    lines = []
    for name, path, prefix in sorted(cores) + sorted(others):
        low, high = (read_text(path / f"{prefix}{end}_freq") for end in ("min", "max"))
        if low and high:
            lines.append(f"{name}: MinFreq={low} MaxFreq={high}")
    return "\n".join(lines) or None
