"""The limits of the parity gates, and the rule that turns a value and its limit into a status.

A limit comes from the manifest's tolerances (written there from the device's profile), else from the starting limits
of this table. Each carries its source; a hand-set one says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtimes.metrics import HIGHER_IS_BETTER
from runtimes.report import Result, Status

if TYPE_CHECKING:
    from runtimes.bundle import Artifact, Bundle

EXPORT, LOSS, INHERITANCE = "export", "quantisation-loss", "inheritance"
#: The export gate of an artifact that is exact but for its int8 KV cache, against the student with a float one.
INT8_CACHE = f"{EXPORT}-int8-cache"
#: forms whose float weights the build quantised itself, when asked to; each has the gate of its name
REQUANTISED = ("int8", "palettised")
#: what a runtime calls a half precision -> the gate's name for it
_HALVES = {"bf16": "bf16", "f16": "fp16"}


@dataclass(frozen=True)
class Limit:
    """A gate's limit and where it comes from."""

    value: float
    source: str


_START = "starting limit"
_TAIL = "hand-set: one position in a thousand may carry 100 times the mean limit"
_TIE = "hand-set: a code whose two nearest entries are equally far may flip in float32"
_FAST = "hand-set: activations may cost what int4 weights may"
_HALF = "hand-set: ten times the starting limit of the exact mode, where the bundle has no noise floor"
_CACHE = "hand-set: an int8 cache may cost what int8 weights may"
_NEAR = "hand-set: near-ties may flip as often as with int8 activations (fast_same_top); mean_kl says how near they are"
_EIGHT = "hand-set: what 8-bit weights may move a picture or a sound by, on top of the loss against the original"
_VIEW = "hand-set: the fp16 decoder limit of 40 dB, in the terms of the medium"

_EXPORT_FLOAT = {"relative_max_error": Limit(1e-4, _START), "same_top": Limit(1.0, "starting limit: ties apart")}
_EXPORT_QUANTISED = {
    "mean_kl": Limit(1e-4, _START),
    "p999_kl": Limit(1e-2, _TAIL),
    "same_top": Limit(0.995, _START),
}
_EXPORT_FAST = {"mean_kl": Limit(0.05, _FAST), "p999_kl": Limit(5.0, _TAIL), "same_top": Limit(0.91, _FAST)}
_EXPORT_HALF = {"mean_kl": Limit(1e-3, _HALF), "p999_kl": Limit(0.1, _TAIL), "same_top": Limit(0.98, _HALF)}
_EXPORT_CACHE = {"mean_kl": Limit(0.005, _CACHE), "p999_kl": Limit(0.5, _TAIL), "same_top": Limit(0.95, _NEAR)}
_SIGNAL_VIEW = {"psnr": Limit(40.0, _VIEW), "ssim": Limit(0.99, _VIEW), "si_snr": Limit(40.0, _VIEW)}
_SIGNAL_FLOAT = {"relative_max_error": Limit(1e-4, _START), **_SIGNAL_VIEW}
_SIGNAL_HALF = {"snr": Limit(40.0, _START), **_SIGNAL_VIEW}
_SIGNAL_INT8 = {
    "psnr_loss": Limit(0.6, _START),
    "psnr": Limit(30.0, _EIGHT),
    "ssim": Limit(0.95, _EIGHT),
    "si_snr": Limit(20.0, _EIGHT),
}
_CODES = {"codes_equal": Limit(0.99, _TIE)}
_LOSS = {
    "float16": {"mean_kl": Limit(1e-4, _START), "p999_kl": Limit(1e-2, _TAIL), "same_top": Limit(0.995, _START)},
    "int8": {"mean_kl": Limit(0.005, _START), "p999_kl": Limit(0.5, _TAIL), "same_top": Limit(0.97, _START)},
    "int4": {"mean_kl": Limit(0.05, _START), "p999_kl": Limit(5.0, _TAIL), "same_top": Limit(0.91, _START)},
}


def weight_class(artifact: Artifact) -> str:
    """ "float32", "float16", "int8", "int4"...: the first word of the artifact's weight precision."""
    return artifact.precision.get("weights", "float32").split()[0].replace("bfloat16", "float16")


def is_quantised(artifact: Artifact) -> bool:
    """Whether the artifact's weights are integer codes."""
    return weight_class(artifact).startswith(("int", "uint"))


def export_gate(artifact: Artifact, effective: Mapping[str, str] | None = None) -> str:
    """The name of the export-parity gate: "export" in exact mode, else "export-" and the precision, form or mode.

    Args:
        effective: what the loaded model computes in, as its session says. A fast mode that turns out to compute in
            bfloat16 or float16 is held to that precision's noise floor, any other to the limits of "export-fast".
    """
    if artifact.form in REQUANTISED:
        return f"{EXPORT}-{artifact.form}"
    if artifact.mode == "exact":
        return INT8_CACHE if any(state.dtype == "int8" for state in artifact.states) else EXPORT
    half = _HALVES.get((effective or {}).get("precision", ""), artifact.mode)
    return f"{EXPORT}-{half if artifact.mode == 'fast' else artifact.mode}"


def export_limits(bundle: Bundle, artifact: Artifact, gate: str) -> dict[str, Limit]:
    """The metrics of an artifact's export gate, each with its limit."""
    in_full = artifact.precision.get("activations", "float32") == "float32"
    if artifact.component == "lm":
        plain = _EXPORT_FLOAT if in_full and weight_class(artifact) == "float32" else _EXPORT_QUANTISED
        defaults = {"exact": plain, "fp16": _EXPORT_HALF, "fast": _EXPORT_FAST}[artifact.mode]
        defaults = _EXPORT_FAST if artifact.form in REQUANTISED else defaults
        defaults = _EXPORT_CACHE if gate == INT8_CACHE else defaults
    elif artifact.component.endswith("_encoder"):
        defaults = _CODES
    else:
        full = _SIGNAL_FLOAT if in_full and artifact.mode == "exact" else _SIGNAL_HALF
        defaults = _SIGNAL_INT8 if artifact.form in REQUANTISED else full
        other = {"image_decoder": ("si_snr",), "audio_decoder": ("psnr", "ssim", "psnr_loss")}[artifact.component]
        defaults = {metric: limit for metric, limit in defaults.items() if metric not in other}
    return _from_manifest(bundle, artifact.component, gate, defaults)


def loss_limits(bundle: Bundle, artifact: Artifact) -> dict[str, Limit]:
    """The metrics of the quantisation-loss gate of a language model; the widest table for a class without its own."""
    return _from_manifest(bundle, artifact.component, LOSS, _LOSS.get(weight_class(artifact), _LOSS["int4"]))


def noise_share(bundle: Bundle) -> float:
    """The share of the largest logit below which a difference is noise: lm's tolerance "noise", or the float limit."""
    return _from_manifest(bundle, "lm", EXPORT, {"noise": _EXPORT_FLOAT["relative_max_error"]})["noise"].value


def _from_manifest(bundle: Bundle, component: str, gate: str, defaults: dict[str, Limit]) -> dict[str, Limit]:
    held = {t.metric: Limit(t.limit, t.source) for t in bundle.tolerances if (t.component, t.gate) == (component, gate)}
    return {metric: held.get(metric, limit) for metric, limit in defaults.items()}


def judge(
    artifact: Artifact, gate: str, metric: str, value: float | None, limit: Limit, where: str, stand_in: str | None
) -> Result:
    """The row of one metric. No value (it could not be computed) fails. On a stand-in, a pass is only a proxy."""
    base = metric.split("/")[0]
    good = value is not None and (value >= limit.value if base in HIGHER_IS_BETTER else value <= limit.value)
    status: Status = ("proxy" if stand_in else "passed") if good else "failed"
    return Result(
        component=artifact.component,
        backend=artifact.backend,
        form=artifact.form,
        mode=artifact.mode,
        gate=gate,
        metric=metric,
        value=None if value is None or value != value or abs(value) == float("inf") else value,
        limit=limit.value,
        limit_source=limit.source,
        status=status,
        where=f"{where}; run on {stand_in}" if stand_in else where,
    )
