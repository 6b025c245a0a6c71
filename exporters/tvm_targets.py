"""What code is made for a profile: the variant of the C++ kernels, their compiler, and TVM's target, as tables."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from device_profiles.schema import Profile
from exporters.errors import ExportError


@dataclass(frozen=True)
class Variant:
    """One build of the CPU kernels.

    Attributes:
        isa: extensions that the processor must have, as profiles name them.
        flags: of g++.
        features: of LLVM, for the code that TVM generates itself.
    """

    name: str
    isa: tuple[str, ...]
    flags: tuple[str, ...]
    features: tuple[str, ...]


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
#: architecture -> variants, the fastest first; see kernels/cpu/README.md
VARIANTS: Mapping[str, tuple[Variant, ...]] = {
    "x86_64": (
        Variant(
            "avx512vnni",
            ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni"),
            (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
            ("+avx2", "+fma", "+f16c"),
        ),
        Variant("avxvnni", ("avx2", "fma", "f16c", "avx_vnni"), (*_AVX2, "-mavxvnni"), ("+avx2", "+fma", "+f16c")),
        Variant("avx2", ("avx2", "fma", "f16c"), _AVX2, ("+avx2", "+fma", "+f16c")),
    ),
    "aarch64": (
        Variant("i8mm", ("neon", "dotprod", "i8mm"), ("-march=armv8.2-a+dotprod+i8mm",), ("+neon", "+dotprod")),
        Variant("dotprod", ("neon", "dotprod"), ("-march=armv8.2-a+dotprod",), ("+neon", "+dotprod")),
        Variant("neon", ("neon",), ("-march=armv8-a",), ("+neon",)),
    ),
}
#: (architecture, operating system) -> the g++ that builds for it from another machine, and TVM's triple
CROSS: Mapping[tuple[str, str], tuple[str, str]] = {
    ("x86_64", "linux"): ("x86_64-linux-gnu-g++", "x86_64-linux-gnu"),
    ("aarch64", "linux"): ("aarch64-linux-gnu-g++", "aarch64-linux-gnu"),
}
_MACHINES = {"AMD64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True)
class CpuTarget:
    """How a CPU artifact is made: TVM's target as a JSON object, the kernels' variant and the compiler's command."""

    tvm: Mapping[str, Any]
    arch: str
    variant: Variant
    compiler: str


def kind_of(profile: Profile) -> str | None:
    """The kind of TVM's target, such as "llvm" or "cuda"; None where the profile has no target."""
    return None if profile.tvm_target is None else json.loads(profile.tvm_target)["kind"]


def cpu_target(profile: Profile) -> CpuTarget:
    """The target of a profile whose kind is llvm.

    Raises:
        ExportError: a processor or system that the kernels are not built for.
    """
    where = f"profile {profile.name}"
    cross = CROSS.get((profile.arch, profile.os))
    if cross is None:
        built = ", ".join(f"{arch} {system}" for arch, system in CROSS)
        raise ExportError(
            f"no C++ compiler for {profile.arch} {profile.os}", where=where, way_out=f"Kernels are built for: {built}."
        )
    own = _MACHINES.get(platform.machine(), platform.machine()) == profile.arch and platform.system() == "Linux"
    compiler, triple = cross
    there = set(profile.isa or (("neon",) if profile.arch == "aarch64" else ()))
    variant = next((v for v in VARIANTS[profile.arch] if there.issuperset(v.isa)), None)
    if variant is None:
        needed = VARIANTS[profile.arch][-1].isa
        raise ExportError(
            f"the kernels need {', '.join(needed)}, the profile's isa is {sorted(there)}",
            where=where,
            way_out="Choose another backend with --backends.",
        )
    target = {"mtriple": triple, "mattr": list(variant.features)} | json.loads(profile.tvm_target or "{}")
    return CpuTarget(target, profile.arch, variant, "g++" if own else compiler)
