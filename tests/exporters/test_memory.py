"""The memory of a build follows from the checkpoint and its largest matrix, not from the model in floats."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.random_student import write_student

#: What an export needs whatever the student: graphs, tracing, the allocator.
FIXED = 250 << 20
#: What a whole build may take beside its checkpoint, parity and its sessions included; the golden logits, all of a
#: vocabulary each, are most of it.
WHOLE = 500 << 20
ROOT = Path(__file__).parents[2]

_CHILD = """
import json, sys
from dataclasses import replace
from pathlib import Path
from device_profiles import load_profile
from exporters.build import Request, build
from exporters.heap import return_large_blocks
from runtimes.host import peak_rss_bytes
tiny, student, out = map(Path, sys.argv[1:])
return_large_blocks()  # as the command does
host = load_profile("host")
profile = replace(host, components={"lm": ("onnx/fused/exact", "onnx/fused/fast")})

def peaks(package, output):
    exported = []
    def progress(stage, size):
        if stage == "golden outputs of lm":
            exported.append(peak_rss_bytes())
    # The logits of random weights are so near each other that rounded activations reorder them.
    request = Request(profile, package, None, output, ("onnx",), 256, bench=False, allow_failed=True)
    bundle, report, _ = build(request, progress)
    assert bundle.inheritance["identical"] == bundle.inheritance["total"] > 0
    exact = [row.status for row in report.results if row.gate == "export"]
    assert exact and set(exact) == {"passed"}
    return exported[0], peak_rss_bytes()

_, before = peaks(tiny, out / "tiny")  # loads every library
print(json.dumps([peak - before for peak in peaks(student, out / "small")]))
"""


@pytest.mark.long
def test_a_build_streams_the_weights(tmp_path: Path) -> None:
    tiny, student = write_student(tmp_path / "t", "tiny"), write_student(tmp_path / "s", "small")
    command = [sys.executable, "-c", _CHILD, str(tiny), str(student), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    exported, whole = json.loads(done.stdout.splitlines()[-1])
    checkpoint = (student / "model.safetensors").stat().st_size
    table = 40_003 * 768 * 4  # of the float32 embedding, the largest matrix
    assert checkpoint > 90 << 20
    # The model in float32 would be 425 MB, and in float64, which the golden outputs are compared with, 850 MB.
    assert exported < checkpoint + table + FIXED
    assert whole < checkpoint + WHOLE
    print(f"grew by {exported / 2**20:.0f} and {whole / 2**20:.0f} MiB over {checkpoint / 2**20:.0f} MiB")
