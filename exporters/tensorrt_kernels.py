"""What a device needs besides the ONNX files to run our kernels: their PTX, and the sources of the plugins.

One PTX file serves the whole bundle and holds the entry points that its artifacts call, for the weight formats that
they have. The plugin library is built on the device against its own TensorRT, from sources that include no CUDA
header of the build machine (runtimes/tensorrt_plugins.py).
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from exporters import cuda_kernels
from exporters.kernel_cache import kept
from exporters.ops.tensorrt import EDGE, WEIGHTS_AT
from exporters.plugin_sources import plugin_sources
from exporters.tensorrt_generations import generation_of

if TYPE_CHECKING:
    from device_profiles import Profile
    from runtimes.bundle import Artifact

#: Op type of a node -> the folder of its kernel.
KERNELS: Mapping[str, str] = {
    **dict.fromkeys(("EdgeLinear", "EdgeLinearResidual", "EdgeNormLinear", "EdgeNormLinearSwiglu"), "linear"),
    **dict.fromkeys(("EdgeHead", "EdgeMergeTop"), "head"),
    **dict.fromkeys(("EdgeAttention", "EdgeAttentionMerge"), "attention"),
    "EdgeCodebook": "codebook",
    "EdgeGroupNormSilu": "group_norm",
    "EdgeBiasActivation": "bias_activation",
}
#: Widths of a head that attention is compiled for; a head takes the next one.
WIDTHS = (64, 128, 256)


def variants(model: ir.Model) -> list[str]:
    """Weight formats and head widths of our nodes in a model, as kernels/cuda/common/select.h names them."""
    found = set()
    for node in model.graph:
        if node.domain == EDGE and node.op_type in WEIGHTS_AT:
            scales = node.inputs[WEIGHTS_AT[node.op_type] + 1]
            dtype = "f16" if scales.dtype == ir.DataType.FLOAT16 else "f32"
            found.add(f"{KERNELS[node.op_type]}_w{node.attributes['bits'].as_int()}_{dtype}")
        elif node.domain == EDGE and node.op_type == "EdgeAttention":
            width = int(node.inputs[1].shape[3])
            found.add(f"d{next((each for each in WIDTHS if width <= each), WIDTHS[-1])}")
    return sorted(found)


def refused_width(width: int) -> str | None:
    """Why our attention does not take heads of that width, or None."""
    if width % 8 or width > WIDTHS[-1]:
        return f"our attention takes heads whose width is a multiple of 8 up to {WIDTHS[-1]}, not {width}"
    return None


def write_kernels(profile: Profile, artifacts: Iterable[Artifact], out: Path) -> None:
    """Writes tensorrt/kernels/edge_<sm>.ptx and tensorrt/plugin/ where an artifact calls our kernels.

    Raises:
        CompilerMissing, KernelsRefused: see cuda_kernels.compile_ptx.
    """
    callers = [artifact for artifact in artifacts if artifact.options.get("plugins")]
    if not callers:
        return
    names = {KERNELS[name] for artifact in callers for name in artifact.options["plugins"]}
    only = {token for artifact in callers for token in artifact.options["kernels"]}
    if generation_of(profile).ahead_of_time:
        only.add("any")
    # PTX for an older CUDA runs on a newer one: where the device's is unknown, the oldest that knows its GPU.
    cuda = profile.cuda_version or ("12.6" if profile.sm in cuda_kernels.NVRTC_SMS else "13.0")
    compiled = partial(cuda_kernels.compile_ptx, profile.sm or "", cuda, sorted(names), sorted(only))
    target = out / "tensorrt" / "kernels" / f"edge_{profile.sm}.ptx"
    target.parent.mkdir(parents=True)
    target.write_bytes(kept(_key(compiled.args), compiled))
    for name, path in plugin_sources().items():
        copy = out / "tensorrt" / "plugin" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def _key(arguments: tuple[object, ...]) -> str:
    """Over what is compiled, by which compiler's version: one is pinned for each CUDA."""
    digest = hashlib.sha256(repr((arguments, cuda_kernels.NVRTC_PACKAGES, cuda_kernels.NVCC_PACKAGES)).encode())
    for path in sorted(cuda_kernels.SOURCES.rglob("*.cuh")) + sorted(cuda_kernels.SOURCES.rglob("*.h")):
        digest.update(path.read_bytes())
    return f"{digest.hexdigest()}.ptx"
