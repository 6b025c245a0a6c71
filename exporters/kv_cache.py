"""The steps of an int8 KV cache: one for each channel of each layer's keys and values, from what calibration reaches.

Symmetric, as com.microsoft.GroupQueryAttention takes them (k_quant_type PER_CHANNEL); the keys are those with RoPE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from exporters.families.attention import RangeReader
from exporters.families.reference_lm import streamed_reference
from exporters.families.streaming import TOKENS
from exporters.quantise.calibration import LONGEST, WAY_OUT, Calibration, CalibrationError, batch

if TYPE_CHECKING:
    from exporters.student import Student

#: What the codes' range leaves above the largest value that calibration saw; beyond it values are clipped.
MARGIN = 1.25
#: The smallest magnitude of a channel that counts, so that a step is never zero.
_FLOOR = 1e-6


def cache_steps(student: Student, calibration: Calibration | None, capacity: int) -> Mapping[str, np.ndarray]:
    """Name of a state -> its steps float32 [kv_heads, 1, D], keys and values of every layer in turn.

    Args:
        capacity: positions of the cache. RoPE turns a key by its position, so a channel reaches further at positions
            that short rows never have: the rows are joined to chains as long as the cache, or as LONGEST.

    Raises:
        CalibrationError: there is no calibration data.
    """
    if calibration is None:
        raise CalibrationError(
            "an int8 KV cache is fitted to data, and there is none", where=str(student.folder), way_out=WAY_OUT
        )
    ids, kept = batch(torch.cat(calibration.rows).split(min(capacity, LONGEST)))
    reader, model = RangeReader(), streamed_reference(student).base_model
    each = max(1, TOKENS // ids.shape[1])
    for rows, mask in zip(ids.split(each), kept.split(each), strict=True):
        reader.kept = mask
        with torch.no_grad():
            model(input_ids=rows, past_key_values=reader, use_cache=True)
    steps = {}
    for layer in sorted(reader.keys):
        for kind, held in (("key", reader.keys), ("value", reader.values)):
            largest = held[layer].clamp(min=_FLOOR)[:, None]
            steps[f"{kind}_{layer}"] = (largest * MARGIN / 127).numpy()
    return steps
