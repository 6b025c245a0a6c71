"""Whether a device is in the state that its profile's figures are for. Nothing here changes that state.

Power modes are compared by name, since their numbers differ by board; clocks are steady where `jetson_clocks` has set
each lowest frequency to the highest one (NVIDIA Jetson Linux Developer Guide, "Power and performance").
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any

from runtimes.host import power_mode

# "GPU MinFreq=306000000 MaxFreq=1300500000 CurrentFreq=306000000"; "EMC ... FreqOverride=1" is locked by that.
_CLOCK = re.compile(r"^(\S+?):?\s.*?MinFreq=(\d+)\s+MaxFreq=(\d+)(?!.*FreqOverride=1)", re.MULTILINE)


def why_not_timed(profile: Mapping[str, Any]) -> str:
    """Why a timing taken now would not be the profile's; "" when nothing speaks against it."""
    return reasons(profile.get("power_mode"), power_mode(), clocks())


def reasons(wanted: str | None, mode: str | None, shown: str | None) -> str:
    """The same from what was asked for and seen.

    Args:
        wanted: the profile's power mode, None where it has none.
        mode: the device's, None where there is no nvpmodel.
        shown: what `jetson_clocks --show` printed, None where there is no such tool.
    """
    found = []
    if wanted is not None and mode is not None and mode.removeprefix("MODE_") != wanted.removeprefix("MODE_"):
        found.append(f"power mode is {mode}, the profile's is {wanted}: sudo nvpmodel -m <number of {wanted}>")
    loose = [name for name, low, high in _CLOCK.findall(shown or "") if low != high]
    if loose:
        found.append(f"clocks of {', '.join(loose)} are not locked: sudo jetson_clocks")
    return "; ".join(found)


def clocks() -> str | None:
    """What `jetson_clocks --show` prints; None on a machine without it, or where it does not answer."""
    tool = shutil.which("jetson_clocks")
    if tool is None:
        return None
    try:
        done = subprocess.run([tool, "--show"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
