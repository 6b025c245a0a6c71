"""Which ONNX a version of TensorRT takes: a table, filled by what its parser did and what its notes say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporters.errors import ExportError

if TYPE_CHECKING:
    from device_profiles import Profile

RTX, RTX_GENERATION = "TensorRT-RTX", "rtx"


@dataclass(frozen=True)
class Generation:
    """Versions of TensorRT that are fed alike.

    Attributes:
        name: as it stands in an artifact's options.
        since: first version, (major, minor); None for TensorRT-RTX, which counts its own.
        target: column of lowerings in exporters/ops/tensorrt.py.
        opset, ir_version: of the ONNX file.
        group_norm: the parser takes GroupNormalization-21.
        int8_blocks: it dequantises INT8 in blocks, not only per tensor and per channel.
        plugins: it takes plugins, ours among them; ahead_of_time: as PTX without a C++ library.
    """

    name: str
    since: tuple[int, int] | None
    target: str
    opset: int
    ir_version: int
    group_norm: bool
    int8_blocks: bool
    plugins: bool
    ahead_of_time: bool


# Newest first. TRT_KVCacheUpdate and TRT_Attention are nodes of TensorRT 11's parser and of RTX 1.7's; GroupNorm of
# opset 21 came with 10.9 and INT4 with 10.0 (NVIDIA/TensorRT, CHANGELOG.md). What RTX takes was tried with 1.7.1.116.
GENERATIONS = (
    Generation(
        RTX_GENERATION, None, "native", 24, 11, group_norm=True, int8_blocks=True, plugins=False, ahead_of_time=False
    ),
    Generation("11", (11, 0), "native", 24, 11, group_norm=True, int8_blocks=True, plugins=True, ahead_of_time=True),
    Generation(
        "10.9", (10, 9), "decomposed", 21, 10, group_norm=True, int8_blocks=False, plugins=True, ahead_of_time=True
    ),
    Generation(
        "10.3", (10, 3), "decomposed", 21, 10, group_norm=False, int8_blocks=False, plugins=True, ahead_of_time=False
    ),
)


def generation_of(profile: Profile) -> Generation:
    """The generation of the profile's TensorRT. Raises ExportError for a version that is not known."""
    version = profile.tensorrt_version or ""
    match = re.match(r"(\d+)\.(\d+)", version)
    for generation in GENERATIONS:
        if generation.since is None:
            if version.startswith(RTX):
                return generation
        elif match and (int(match[1]), int(match[2])) >= generation.since:
            return generation
    raise ExportError(
        f"TensorRT {version or '(no version)'} is not known",
        where=f"profile {profile.name}: tensorrt_version",
        way_out=f"Give {GENERATIONS[-1].name} or newer, or '{RTX} 1.7.1.116'.",
    )
