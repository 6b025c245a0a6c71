"""Whether a device's state is the profile's, from what its own tools print (Orin and Thor, JetPack 5 to 7)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtimes import host
from runtimes.jetson import clocks_of, reasons
from runtimes.nvidia_smi import parse

LOCKED = """SOC family:tegra234  Machine:NVIDIA Jetson AGX Orin Developer Kit
Online CPUs: 0-7
cpu0:  Online=1 Governor=schedutil MinFreq=1728000 MaxFreq=1728000 CurrentFreq=1728000 IdleStates: WFI=0 c7=0
cpu8:  Online=0 Governor=schedutil MinFreq=729600 MaxFreq=2201600 CurrentFreq=729600 IdleStates: WFI=1 c7=1
GPU MinFreq=612000000 MaxFreq=612000000 CurrentFreq=612000000
Active GPU TPCs: 4
EMC MinFreq=204000000 MaxFreq=3199000000 CurrentFreq=3199000000 FreqOverride=1
DLA0_CORE:   Online=1 MinFreq=0 MaxFreq=1369600000 CurrentFreq=1369600000
PVA0_VPS0: Online=1 MinFreq=0 MaxFreq=512000000 CurrentFreq=512000000
FAN Dynamic Speed Control=nvfancontrol hwmon0_pwm1=48
NV Power Mode: MODE_30W
"""
JETPACK_7 = """cpu10: Governor=schedutil MinFreq=2201600 MaxFreq=2201600 CurrentFreq=2201600 IdleStates: WFI=0 c7=0
GPU MinFreq=1300500000 MaxFreq=1300500000 CurrentFreq=1300500000
EMC MinFreq=3199000000 MaxFreq=3199000000 CurrentFreq=3199000000
DLA1_FALCON: Online=1 MinFreq=0 MaxFreq=844800000 CurrentFreq=844800000
"""
FREE = """cpu0: Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1728000 CurrentFreq=1190400 IdleStates: WFI=1 c7=1
GPU MinFreq=306000000 MaxFreq=918000000 CurrentFreq=306000000
EMC MinFreq=204000000 MaxFreq=3199000000 CurrentFreq=2133000000 FreqOverride=0
"""


OTHER_MODE = "power mode is MODE_30W, the profile's is MAXN: sudo nvpmodel -m <number of MAXN>"
LOOSE = "clocks of {} are not locked: sudo jetson_clocks"


@pytest.mark.parametrize(
    ("wanted", "mode", "shown", "words"),
    [
        ("30W", "MODE_30W", LOCKED, ""),
        ("MAXN", "MAXN", JETPACK_7, ""),
        ("MAXN", "MODE_30W", LOCKED, OTHER_MODE),
        ("MAXN", None, LOCKED, "power mode is unknown (nvpmodel -q does not say), the profile's is MAXN"),
        ("MAXN", "MAXN", FREE, LOOSE.format("cpu0, GPU, EMC")),
        ("MAXN", "MODE_30W", FREE, f"{OTHER_MODE}; {LOOSE.format('cpu0, GPU, EMC')}"),
        ("MAXN", "MAXN", LOCKED.replace("GPU MinFreq=612000000", "GPU MinFreq=306000000"), LOOSE.format("GPU")),
        (None, None, None, ""),  # a PC with a GPU: its clocks are recorded, and no more
    ],
)
def test_only_the_profiles_own_state_is_timed(
    wanted: str | None, mode: str | None, shown: str | None, words: str
) -> None:
    assert reasons(wanted, mode, shown) == words


@pytest.mark.parametrize(("answer", "mode"), [("echo NV Power Mode: MAXN", "MAXN"), ("echo", None), ("sleep 60", None)])
def test_a_power_mode_that_is_not_told(
    answer: str, mode: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tool that hangs, as nvpmodel does while its service restarts, leaves the mode unknown."""
    tool = tmp_path / "nvpmodel"
    tool.write_text(f"#!/bin/sh\nexec {answer}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(host, "NVPMODEL_SECONDS", 0.5)
    assert host.power_mode() == mode


def write(folder: Path, low: int, high: int, prefix: str = "") -> None:
    folder.mkdir(parents=True)
    (folder / f"{prefix}min_freq").write_text(f"{low}\n")
    (folder / f"{prefix}max_freq").write_text(f"{high}\n")


@pytest.mark.parametrize("gpu", ["17000000.gpu", "17000000.ga10b", "gpu-gpc-0"])
@pytest.mark.parametrize("locked", [True, False])
def test_limits_from_sysfs_say_the_same(tmp_path: Path, gpu: str, locked: bool) -> None:
    write(tmp_path / "devices/system/cpu/cpu0/cpufreq", 1728000, 1728000, "scaling_")
    (tmp_path / "devices/system/cpu/cpu8").mkdir()  # off
    write(tmp_path / "class/devfreq" / gpu, 918000000 if locked else 306000000, 918000000)
    write(tmp_path / "class/devfreq/15340000.vic", 0, 729600000)
    write(tmp_path / "class/devfreq/gpu-nvd-0", 0, 1692000000)  # Thor's video engine
    found = reasons(None, None, clocks_of(tmp_path))
    assert found == ("" if locked else LOOSE.format(gpu))


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    assert clocks_of(tmp_path) is None


H200 = (
    "NVIDIA H200, GPU-1f5a0d2c-93ab-4c1e-8f60-0123456789ab, 580.95.05, P0, 1980 MHz, 3201 MHz, 1980 MHz, 3201 MHz, "
    "119.55 W, 700.00 W, 31, 0x0000000000000000\n"
)
OTHER = H200.replace("1f5a0d2c", "00000000").replace("580.95.05", "470.1")
UUID = "1f5a0d2c93ab4c1e8f600123456789ab"


def test_the_right_gpu_of_several_is_recorded() -> None:
    state = parse(OTHER + H200, UUID)
    assert state["name"] == "NVIDIA H200" and state["driver_version"] == "580.95.05"
    assert state["clocks.sm"] == "1980 MHz" and state["power.limit"] == "700.00 W"


@pytest.mark.parametrize(
    "reply",
    ["", OTHER, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", "a, b\n"],
)
def test_a_reply_without_that_gpu_records_nothing(reply: str) -> None:
    assert parse(reply, UUID) == {}


def test_what_the_tool_cannot_tell_is_left_out() -> None:
    thor = H200.replace("119.55 W", "[N/A]").replace("3201 MHz", "[Not Supported]")
    assert set(parse(H200, UUID)) - set(parse(thor, UUID)) == {"power.draw", "clocks.mem", "clocks.max.mem"}
