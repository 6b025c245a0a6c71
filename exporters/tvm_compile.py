"""Compiles a saved Relax module for a GPU, in a process of its own that has loaded nothing but TVM.

TVM's tensor intrinsics ask Python for the source of every caller while they are imported, which takes minutes where
torch and transformers have loaded thousands of modules, and seconds where they have not.

    python -m exporters.tvm_compile   # a Request as JSON on standard input; kernels as JSON, the last line of output
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm import relax

from exporters.errors import ExportError

#: kind of TVM's target -> what stands in front of a kernel's name in its source
KERNELS: Mapping[str, str] = {
    "cuda": r"__global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\(",
    "metal": r"kernel void (\w+)\(",
    "opencl": r"__kernel void (\w+)\(",
    "webgpu": r"// Function: (\w+)",
}


@dataclass(frozen=True)
class Request:
    """What to compile: the file of the module (tvm.ir.save_json), the target, its host, and the tar to write."""

    module: str
    target: Mapping[str, Any]
    host: Mapping[str, Any]
    library: str


def compile_apart(request: Request) -> list[str]:
    """The names of the kernels in the code that was written.

    Raises:
        ExportError: TVM does not compile it, in its own last words.
    """
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(asdict(request)),
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = next(iter(reversed(done.stderr.strip().splitlines())), f"exit status {done.returncode}")
        kind = request.target["kind"]
        raise ExportError(
            f"TVM does not compile it for {kind}: {last}",
            where=Path(request.library).name,
            way_out="Export it for another backend (--backends)",
        )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Serves one request; see the module text."""
    request = Request(**json.loads(sys.stdin.read()))
    target = tvm.target.Target(dict(request.target), host=dict(request.host))
    module = tvm.ir.load_json(Path(request.module).read_text())
    with target:
        built = tvm.compile(module, target, relax_pipeline=relax.pipeline.get_default_pipeline(target))
    kernels = re.findall(KERNELS[target.kind.name], _source(built.mod, target.kind.name))
    built.export_library(request.library)
    print(json.dumps(kernels))
    return 0


def _source(module: Any, kind: str) -> str:
    """The device's code as text, out of a module or those that it imports."""
    own = module.inspect_source() if module.kind == kind else ""
    return own + "".join(_source(imported, kind) for imported in module.imports)


if __name__ == "__main__":
    sys.exit(main())
