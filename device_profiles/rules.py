"""Pairs that cannot be: what a device lacks, against what its profile asks for.

Each rule is a function from a profile to the (key, what, way out) that it refuses; the table at the end is the list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from device_profiles.schema import COMPONENTS, FORMS, MODES, Profile

Finding = tuple[str, str, str]

# Lowest compute capability whose tensor cores have the type: CUDA C++ Programming Guide, "Compute Capabilities",
# and for Orin (sm_87) the effective precisions of the Jetson stacks: FP16, INT8, and INT4 as weights only.
SM_NEEDED = {"bfloat16": 80, "fp8": 89, "fp4": 100}
SM_KNOWN = ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121")
ISA_OF_ARCH = {
    "x86_64": (
        "sse4_2",
        "avx",
        "f16c",
        "fma",
        "avx2",
        "avx_vnni",
        "avx_vnni_int8",
        "avx512f",
        "avx512bw",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
        "amx_int8",
        "amx_bf16",
    ),
    "aarch64": ("neon", "fp16", "dotprod", "i8mm", "bf16", "sve", "sve2", "sme"),
    "wasm32": ("simd128", "relaxed_simd"),
}
# Extensions that do int8 dot products.
INT8_ISA = ("avx_vnni", "avx_vnni_int8", "avx512_vnni", "amx_int8", "dotprod", "i8mm", "relaxed_simd", "avx2", "neon")
# Cores and chips that are known not to have an extension, by LLVM's feature tables (LLVM 22, -mcpu=cortex-a76 and so
# on): the Cortex-A76 and A78AE have dot products but no i8mm; Gracemont and Lunar Lake have AVX2 and AVX-VNNI only.
NO_AVX512 = ("avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16")
NO_I8MM = ("i8mm", "bf16", "sve", "sve2", "sme")
SOC_LACKS = {
    "bcm2712": NO_I8MM,
    "cortex-a76": NO_I8MM,
    "cortex-a78ae": NO_I8MM,
    "n100": NO_AVX512,
    "gracemont": NO_AVX512,
    "lunar lake": NO_AVX512,
}
APPLE = ("macos", "ios")
# The key that says what of a backend the device has.
BACKEND_KEYS = {
    "onnx": "onnxruntime_version",
    "openvino": "openvino_version",
    "tensorrt": "tensorrt_version",
    "coreml": "coreml_target",
    "tvm": "tvm_target",
}


def _dtypes(profile: Profile) -> Iterator[Finding]:
    if profile.sm is None:
        for dtype in sorted({"fp8", "fp4"} & set(profile.dtypes)):
            yield (
                "dtypes",
                f"{dtype} needs an NVIDIA GPU of the right generation, and this device has no sm",
                "Drop it.",
            )
        return
    if profile.sm not in SM_KNOWN:
        yield "sm", f"{profile.sm!r} is no compute capability known here", f"Known: {', '.join(SM_KNOWN)}."
        return
    number = int(profile.sm.removeprefix("sm_"))
    for dtype in profile.dtypes:
        if number < SM_NEEDED.get(dtype, 0):
            yield "dtypes", f"{dtype} needs sm_{SM_NEEDED[dtype]} or newer, this is {profile.sm}", "Drop it."


def _isa(profile: Profile) -> Iterator[Finding]:
    of_arch = ISA_OF_ARCH[profile.arch]
    for flag in profile.isa or ():
        if flag not in of_arch:
            yield "isa", f"{flag!r} is no extension of {profile.arch}", f"Known: {', '.join(of_arch)}."
        for chip, lacking in SOC_LACKS.items():
            if flag in lacking and chip in (profile.soc or "").lower():
                yield "isa", f"{profile.soc} has no {flag}", "Drop it."
    if profile.int8_isa is not None:
        if profile.int8_isa not in INT8_ISA:
            yield "int8_isa", f"{profile.int8_isa!r} has no int8 dot product", f"One of: {', '.join(INT8_ISA)}."
        elif profile.int8_isa not in (profile.isa or ()):
            yield (
                "int8_isa",
                f"{profile.int8_isa} is not in isa",
                "Name an extension that the chip has, or add it to isa.",
            )


def _components(profile: Profile) -> Iterator[Finding]:
    for component, entries in profile.components.items():
        if component not in COMPONENTS:
            yield f"components.{component}", "is no component", f"One of: {', '.join(COMPONENTS)}."
        for entry in entries:
            backend, _, rest = entry.partition("/")
            form, _, mode = rest.partition("/")
            if backend not in FORMS:
                yield f"components.{component}", f"{entry!r}: no backend {backend!r}", f"One of: {', '.join(FORMS)}."
            elif form not in FORMS[backend] or mode not in MODES:
                forms = f"{backend}/{{{','.join(FORMS[backend])}}}/{{{','.join(MODES)}}}"
                yield f"components.{component}", f"{entry!r} is not backend/form/mode", f"Write {forms}."
        if len(set(entries)) != len(entries):
            yield f"components.{component}", "names an entry twice", "Keep the first of them."
    for component in COMPONENTS:
        if not profile.components.get(component):
            yield f"components.{component}", "has no entry", "Name at least one backend/form/mode."


def _backends(profile: Profile) -> Iterator[Finding]:
    drop = "Take the backend out of components."
    for backend in profile.backends:
        key = BACKEND_KEYS.get(backend)
        if backend == "coreml" and profile.os not in APPLE:
            yield "components", f"Core ML runs on macOS and iOS only, this device runs {profile.os}", drop
        elif backend == "tensorrt" and profile.sm is None:
            yield "components", "TensorRT needs an NVIDIA GPU, and this device has no sm", drop
        elif backend == "openvino" and profile.os in ("ios", "android", "browser"):
            yield "components", f"OpenVINO does not run on {profile.os}", drop
        elif key is not None and getattr(profile, key) is None and key in profile.not_applicable:
            yield key, f"is not applicable, yet components name {backend}", f"Give it a value. Or: {drop}"


def _memory(profile: Profile) -> Iterator[Finding]:
    nominal, visible = profile.memory_bytes, profile.memory_visible_bytes
    if nominal is not None and visible is not None and visible > nominal:
        yield "memory_visible_bytes", f"{visible} is more than the nominal memory, {nominal}", "Both are in bytes."
    room = visible or nominal
    if room is not None and profile.rss_bytes > room:
        yield "rss_bytes", f"the budget {profile.rss_bytes} is more than the device has, {room}", "Lower the budget."


RULES: tuple[Callable[[Profile], Iterator[Finding]], ...] = (_dtypes, _isa, _components, _backends, _memory)
