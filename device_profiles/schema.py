"""Profile: everything the build and the benchmarks know of one device, as flat values with units in their names.

The dataclass below is the schema: a profile file gives every field but `sources`, either with a value or by listing
its name under `unknown` (nobody has measured or published it), `not_applicable` (the device has no such thing) or
`detected` (filled in on the machine itself); those become None, or what was detected. A field marked `sourced` needs
an entry under `[sources]` wherever it has a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from device_profiles.quantise import Quantise

COMPONENTS = ("lm", "image_decoder", "image_encoder", "audio_decoder", "audio_encoder")
# Backend -> the forms it has; the first word of a component's entries. Not every one is built yet.
FORMS: Mapping[str, tuple[str, ...]] = {
    "onnx": ("fused", "standard"),
    "openvino": ("ir", "int8"),
    "tvm": ("compiled",),
    "coreml": ("mlprogram", "palettised"),
    "tensorrt": ("fused", "typed", "int8"),
}
MODES = ("exact", "fast", "fp16")
COMPUTE_UNITS = ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL")
FLOAT_TABLES = ("mapped", "packed")
DTYPES = ("float32", "float16", "bfloat16", "int8", "int4", "fp8", "fp4")
ARCHES = ("x86_64", "aarch64", "wasm32")
SYSTEMS = ("linux", "macos", "windows", "ios", "android", "browser")


class ProfileError(Exception):
    """A device profile is not usable: `what` is wrong, `where` (file and key), and the `way_out`."""

    def __init__(self, what: str, where: str, way_out: str) -> None:
        self.what, self.where, self.way_out = what, where, way_out
        super().__init__(what, where, way_out)

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. {self.way_out}"


def _key(
    text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    sourced: bool = False,
    source: str | None = None,
) -> Any:
    """A field: what it means, its plausible range or its choices, whether it needs a source, and a default source."""
    metadata = {"text": text, "low": low, "high": high, "choices": choices, "sourced": sourced, "source": source}
    return field(metadata=metadata)


_GATE = "starting limit of the export gate, to be replaced by a noise floor"
_LOSS = "starting limit of the quantisation-loss gate"


@dataclass(frozen=True)
class Profile:
    """One device. None = unknown or not applicable; `state` tells which."""

    name: str = _key("the file's name without .toml")
    title: str = _key("one line for a table")
    device: str = _key("the product, with the memory size it has")
    soc: str | None = _key("the chip", sourced=True)
    arch: str = _key("architecture of the CPU", choices=ARCHES)
    isa: tuple[str, ...] | None = _key("instruction-set extensions that matter here", sourced=True)
    int8_isa: str | None = _key("the extension that does int8 dot products; one of isa", sourced=True)
    sm: str | None = _key("compute capability of an NVIDIA GPU, as in sm_87", sourced=True)
    memory_bytes: int | None = _key("nominal memory", low=2**24, high=2**50, sourced=True)
    memory_visible_bytes: int | None = _key("memory that programs can see", low=2**24, high=2**50, sourced=True)
    bandwidth_bytes_per_s: int | None = _key("peak memory bandwidth", low=1e8, high=1e14, sourced=True)
    power_mode: str | None = _key("power mode by name (ids differ by board)", sourced=True)
    os: str = _key("operating system", choices=SYSTEMS)
    stack: str | None = _key("what the vendor ships as one: JetPack, driver, browser", sourced=True)
    cuda_version: str | None = _key("CUDA toolkit of that stack", sourced=True)
    onnxruntime_version: str | None = _key("ONNX Runtime on the device", sourced=True)
    float_tables: str | None = _key(
        "float tables of a language model in ONNX Runtime: read where the file is mapped, loaded in a quarter of the "
        "time and a third less memory, or packed at load, with which Intel decodes up to 5 % faster and AMD slower",
        choices=FLOAT_TABLES,
    )
    openvino_version: str | None = _key("OpenVINO on the device", sourced=True)
    openvino_device: str | None = _key("OpenVINO's name of the device to compile for, as in CPU, GPU or AUTO:NPU,CPU")
    tensorrt_version: str | None = _key("TensorRT on the device", sourced=True)
    coreml_target: str | None = _key("Core ML deployment target, as in iOS18", sourced=True)
    coreml_compute_units: str | None = _key(
        "processors that Core ML may use; with the Neural Engine alone beside the CPU, graphs are laid out for it",
        choices=COMPUTE_UNITS,
    )
    tvm_version: str | None = _key("TVM runtime on the device", sourced=True)
    tvm_target: str | None = _key("TVM target, a JSON object with its kind")
    onnx_opset: int = _key("highest opset of an artifact for ONNX Runtime", low=7, high=30, sourced=True)
    tensorrt_opset: int | None = _key("highest opset that TensorRT's parser takes", low=7, high=30, sourced=True)
    dtypes: tuple[str, ...] = _key(
        "types the device computes in, or (int4) holds weights in", choices=DTYPES, sourced=True
    )
    max_batch: int = _key("largest batch of one run", low=1, high=4096)
    max_context: int = _key("largest KV capacity, tokens", low=1, high=2**24)
    ttft_ms: float = _key("budget: time to the first token", low=1e-3, high=1e7)
    tpot_ms: float = _key("budget: time per further token", low=1e-3, high=1e7)
    rss_bytes: int = _key("budget: peak resident memory", low=2**20, high=2**50)
    bundle_bytes: int = _key("budget: size of the bundle", low=2**16, high=2**50)
    float_relative: float = _key("export gate, float: relative maximum error", low=0, high=1, source=_GATE)
    kl: float = _key("export gate, exact mode: mean KL divergence, nats", low=0, high=10, source=_GATE)
    same_top: float = _key("export gate, exact mode: share of equal top tokens", low=0, high=1, source=_GATE)
    fast_kl: float = _key("vendor fast mode: mean KL divergence, nats", low=0, high=10, sourced=True)
    fast_same_top: float = _key("vendor fast mode: share of equal top tokens", low=0, high=1, sourced=True)
    codec_relative: float = _key("codec gate, float32: relative maximum error", low=0, high=1, source=_GATE)
    codec_fp16_snr_db: float = _key("codec gate, float16: least signal-to-noise ratio", low=0, high=200, source=_GATE)
    codec_int8_loss_db: float = _key("codec gate, int8: largest loss", low=0, high=100, source=_GATE)
    loss_fp16_kl: float = _key("quantisation loss, fp16: mean KL divergence, nats", low=0, high=10, source=_LOSS)
    loss_int8_kl: float = _key("quantisation loss, int8: mean KL divergence, nats", low=0, high=10, source=_LOSS)
    loss_int4_kl: float = _key("quantisation loss, int4: mean KL divergence, nats", low=0, high=10, source=_LOSS)
    loss_fp16_same_top: float = _key("quantisation loss, fp16: equal top tokens", low=0, high=1, source=_LOSS)
    loss_int8_same_top: float = _key("quantisation loss, int8: equal top tokens", low=0, high=1, source=_LOSS)
    loss_int4_same_top: float = _key("quantisation loss, int4: equal top tokens", low=0, high=1, source=_LOSS)
    loss_int8_task: float = _key("quantisation loss, int8: task metric over float's", low=0, high=1, source=_LOSS)
    loss_int4_task: float = _key("quantisation loss, int4: task metric over float's", low=0, high=1, source=_LOSS)
    components: Mapping[str, tuple[str, ...]] = _key("component -> backend/form/mode, the preferred one first")
    quantise: Quantise = _key(  # noqa: RUF009
        "what the build quantises by itself (device_profiles/quantise.py); absent: nothing"
    )
    sources: Mapping[str, str] = _key("key -> where its value comes from")
    unknown: tuple[str, ...] = _key("keys whose value nobody has measured or published")
    not_applicable: tuple[str, ...] = _key("keys of things that the device does not have")

    @property
    def backends(self) -> tuple[str, ...]:
        """Backends that the components name, in the order of first mention."""
        entries = [entry for component in COMPONENTS for entry in self.components.get(component, ())]
        return tuple(dict.fromkeys(entry.split("/")[0] for entry in entries))

    def source(self, key: str) -> str:
        """Where the value of `key` comes from; empty for a choice of ours that needs no source."""
        metadata = {item.name: item.metadata for item in fields(self)}[key]
        return self.sources.get(key) or metadata["source"] or ""

    def state(self, key: str) -> str:
        """`known`, `unknown` or `not applicable`."""
        return "unknown" if key in self.unknown else "not applicable" if key in self.not_applicable else "known"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values in a fixed order (keys sorted), for the bundle's manifest."""
        plain = {item.name: _plain(getattr(self, item.name)) for item in fields(self)}
        return dict(sorted(plain.items()))


def _plain(value: Any) -> Any:
    if isinstance(value, Quantise):
        return value.as_dict()
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return {key: _plain(value[key]) for key in sorted(value)}
    return value


def schema_table() -> str:
    """The keys of a profile as a Markdown table, made from the dataclass."""
    lines = ["| key | type | source needed | meaning |", "| --- | --- | --- | --- |"]
    for item in fields(Profile):
        needed = "yes" if item.metadata["sourced"] else ""
        kind = str(item.type).replace("|", "or").replace("Mapping", "table").replace("tuple[str, ...]", "list")
        lines.append(f"| `{item.name}` | {kind} | {needed} | {item.metadata['text']} |")
    return "\n".join(lines)
