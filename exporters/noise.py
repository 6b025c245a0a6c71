"""Noise floors: how far the reference moves by itself when it computes in an artifact's own dtype.

A gate's limit is a stated multiple of that, so that it follows from the student and not from a guess.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from runtimes.metrics import TopAgreement, flip_margins, kl_divergence, percentile, psnr, si_snr, snr, ssim

#: name of a precision, as gates have it -> dtype that the reference takes for its noise floor
DTYPES: Mapping[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
#: mode of an artifact -> precisions it may compute in: a vendor's fast mode takes what the processor has
PRECISIONS: Mapping[str, tuple[str, ...]] = {"exact": (), "fp16": ("fp16",), "fast": ("bf16", "fp16")}


@dataclass(frozen=True)
class Floor:
    """One component's reference in one dtype against itself in float32.

    Attributes:
        precision: a key of DTYPES, or exporters.contents.ROUNDED.
        metrics: metric -> value, the worst over all golden cases.
        positions: of logits that they were measured on; 0 for signals.
    """

    component: str
    precision: str
    metrics: Mapping[str, float]
    positions: int = 0


def logit_noise(reference: np.ndarray, result: np.ndarray, tie: float) -> dict[str, float]:
    """mean_kl, p999_kl and same_top of logits [n, D, V]; ``tie`` in logits is a margin that decides nothing."""
    kl = kl_divergence(reference, result)
    return {
        "mean_kl": float(kl.mean()),
        "p999_kl": percentile(kl, 99.9),
        "same_top": TopAgreement.of(flip_margins(reference, result), tie).same,
    }


def signal_noise(modality: str, pairs: Sequence[tuple[np.ndarray, np.ndarray]], data_range: float) -> dict[str, float]:
    """The worst snr and, by medium, psnr and ssim or si_snr over (reference, result) pairs."""
    rows = []
    for reference, result in pairs:
        row = {"snr": snr(reference, result)}
        if modality == "audio":
            row["si_snr"] = si_snr(reference, result)
        else:
            row |= {"psnr": psnr(reference, result, data_range), "ssim": ssim(reference, result, data_range)}
        rows.append(row)
    return {metric: min(row[metric] for row in rows) for metric in rows[0]}
