"""What `nvidia-smi` says of a discrete GPU: recorded beside a timing, never changed.

Jetsons before Thor have no such numbers: their power mode and clocks are in runtimes/jetson.py.
"""

from __future__ import annotations

import shutil
import subprocess

#: Fields of --query-gpu (nvidia-smi --help-query-gpu), in the order of the reply's columns.
FIELDS = (
    "name",
    "uuid",
    "driver_version",
    "pstate",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "clocks_event_reasons.active",
)
_SECONDS = 20


def gpu_state(uuid: str) -> dict[str, str]:
    """The fields of the GPU with this UUID (hexadecimal digits, as the driver gives them), each with its unit as the
    tool writes it; nothing where the tool is not there, does not answer or does not know that GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    query = [tool, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return parse(done.stdout, uuid) if done.returncode == 0 else {}


def parse(reply: str, uuid: str) -> dict[str, str]:
    """The row of one GPU in the tool's reply, without the fields that it cannot tell."""
    for line in reply.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(FIELDS):
            continue
        row = dict(zip(FIELDS, cells, strict=True))
        if row["uuid"].lower().removeprefix("gpu-").replace("-", "") == uuid:
            # "[N/A]", "[Not Supported]", "[Unknown Error]"
            return {field: value for field, value in row.items() if value and not value.startswith("[")}
    return {}
