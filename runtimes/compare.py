"""Runs a session on its golden inputs and measures how far its outputs are from the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from runtimes.bundle import Bundle, Modality
from runtimes.gates import noise_share
from runtimes.golden import LmGolden, SignalCase, load_cases, load_lm
from runtimes.metrics import (
    HIGHER_IS_BETTER,
    Array,
    TopAgreement,
    flip_margins,
    kl_divergence,
    percentile,
    psnr,
    relative_max_error,
    require_signal,
    si_snr,
    snr,
    ssim,
)
from runtimes.session import CheckedSession

# Prompts from this length on are fed in two chunks.
CHUNKED = 16


@dataclass(frozen=True)
class Found:
    """A metric's value (None: none could be computed) and what it was measured on."""

    value: float | None
    where: str


@dataclass(frozen=True)
class LogitDistance:
    """Two sets of logits, row by row: `kl` and `margins` (see flip_margins) are [n, D]; `error` and `scale` are the
    largest |difference| and the largest |reference|."""

    kl: Array
    margins: Array
    error: float
    scale: float

    @classmethod
    def of(cls, samples: Iterator[tuple[Array, Array]]) -> LogitDistance:
        """From (reference, result) [D, V] per sample: one sample's logits are in memory at a time."""
        kl, margins, error, scale = [], [], 0.0, 0.0
        for reference, result in samples:
            kl.append(kl_divergence(reference, result))
            margins.append(flip_margins(reference, result))
            error = float(np.maximum(error, np.abs(result.astype(np.float64) - reference).max()))  # maximum keeps a NaN
            scale = max(scale, float(np.abs(reference).max()))
        return cls(np.stack(kl), np.stack(margins), error, scale)

    def found(self, noise: float, where: str, rows: Array | None = None) -> dict[str, Found]:
        """Every metric over all rows, or those of a [n, D] mask. `noise` is a share of the largest logit."""
        kl, margins = (self.kl, self.margins) if rows is None else (self.kl[rows], self.margins[rows])
        top = TopAgreement.of(margins, noise * self.scale)
        place = f"; {top.flips} flips, {top.ties} of them ties" if top.flips else "; no flip"
        if top.first is not None:
            at = np.argwhere(np.ones_like(self.kl, bool) if rows is None else rows)[top.first]
            place += f", first at sample {at[0]} step {at[1]} (margin {top.first_margin:.3g})"
        return {
            "relative_max_error": Found(self.error / self.scale if self.scale else None, where),
            "mean_kl": Found(float(kl.mean()), where),
            "p999_kl": Found(percentile(kl, 99.9), where),
            "same_top": Found(top.same, where + place),
        }


def compare_lm(bundle: Bundle, session: CheckedSession) -> dict[str, Found]:
    """Prefill, then single-token steps with the KV cache, teacher-forced, against the golden logits."""
    golden = load_lm(bundle)
    distance = LogitDistance.of(
        (golden.logits[i], run_teacher_forced(session, golden, i)) for i in range(len(golden.ids))
    )
    lengths = ", ".join(map(str, np.unique(golden.prompt)))
    where = f"{len(golden.ids)} samples, prompts of {lengths} tokens, {golden.steps} steps"
    return distance.found(noise_share(bundle), where)


def run_teacher_forced(session: CheckedSession, golden: LmGolden, sample: int) -> Array:
    """float32 [D, V]: a session's logits at every golden step of one sample."""
    ids, prompt = golden.ids[sample : sample + 1], int(golden.prompt[sample])
    logits = np.empty(golden.logits.shape[1:], np.float32)
    session.reset()
    # A long prompt goes in as two chunks: the second one meets a cache that is already filled.
    cut = prompt // 2 if prompt >= CHUNKED else 0
    if cut:
        session.run({"ids": ids[:, :cut]})
    logits[0] = session.run({"ids": ids[:, cut:prompt]})["logits"][0]
    for step in range(1, golden.steps):
        position = prompt + step - 1
        logits[step] = session.run({"ids": ids[:, position : position + 1]})["logits"][0]
    return logits


def compare_loss(bundle: Bundle, golden: LmGolden) -> dict[str, dict[str, Found]]:
    """Quantised against float logits, both of PyTorch: "" for all rows, and by modality of the token that is next."""
    assert golden.float_logits is not None  # the caller asks only when they are there
    distance = LogitDistance.of(zip(golden.float_logits, golden.logits, strict=True))
    noise, targets = noise_share(bundle), golden.targets()
    found = {"": distance.found(noise, f"{targets.size} positions")}
    for name, modality in bundle.modalities.items():
        rows = (targets >= modality.first) & (targets < modality.end)
        if rows.any():
            found[name] = distance.found(noise, f"{int(rows.sum())} positions", rows)
    return found


def compare_decoder(bundle: Bundle, session: CheckedSession) -> dict[str, Found]:
    """Each metric's worst case. Raises EmptyOutput for a blank picture or a silent sound, before any metric."""
    cases = load_cases(bundle, session.artifact)
    modality = bundle.modalities[session.artifact.component.split("_")[0]]
    measured = {case.name: _measure_signal(case, session, modality) for case in cases}
    where = f"{len(cases)} cases, the last of shape {list(next(iter(cases[-1].feeds.values())).shape)}"
    found = {}
    for metric in next(iter(measured.values())):
        pick = min if metric in HIGHER_IS_BETTER else max
        worst = pick(measured, key=lambda name: measured[name][metric])
        found[metric] = Found(measured[worst][metric], f"{where}; worst in {worst}")
    return found


def _measure_signal(case: SignalCase, session: CheckedSession, modality: Modality) -> Mapping[str, float]:
    [(name, expected)] = case.expected.items()
    result = session.run(case.feeds)[name]
    require_signal(expected, f"golden {case.name} {name}")
    require_signal(result, f"{case.name} {name}")
    values = {"relative_max_error": relative_max_error(expected, result), "snr": snr(expected, result)}
    if modality.name == "audio":
        return {**values, "si_snr": si_snr(expected, result)}
    # Pixels of 0..1 become (pixel - mean) / std, so their range is 1 / std.
    data_range = 1.0 / min(modality.preprocessing["std"])
    values |= {"psnr": psnr(expected, result, data_range), "ssim": ssim(expected, result, data_range)}
    if case.signal is not None:
        kept, left = (psnr(case.signal, picture, data_range) for picture in (expected, result))
        values["psnr_loss"] = kept - left
    return values


def compare_encoder(bundle: Bundle, session: CheckedSession) -> dict[str, Found]:
    """The share of equal codes over all cases."""
    equal = total = 0
    first = ""
    for case in load_cases(bundle, session.artifact):
        [(name, expected)] = case.expected.items()
        result = session.run(case.feeds)[name]
        if result.shape != expected.shape:
            return {
                "codes_equal": Found(None, f"{case.name}: shape {list(result.shape)}, expected {list(expected.shape)}")
            }
        same = result == expected
        equal, total = equal + int(same.sum()), total + same.size
        if not first and not same.all():
            first = f"; first in {case.name} at {np.argwhere(~same)[0].tolist()}"
    return {"codes_equal": Found(equal / total, f"{equal} of {total} codes{first}")}
