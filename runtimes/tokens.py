"""Tokens <-> codes of a modality, and which tokens may come next while one is generated.

A modality with K codebooks of size C has the token `first + k * C + code` at grid position (..., k); with one
codebook the token is `first + code`. Tokens run row-major over the grid. (The delivery package's modality table.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.sampling import Allowed
from runtimes.session import RuntimeInputError

if TYPE_CHECKING:
    from runtimes.bundle import Modality

Array = np.ndarray[Any, Any]


def allowed_codes(modality: Modality) -> tuple[Allowed, ...]:
    """The allowed tokens at grid position i are entry i % K: one range per codebook."""
    size = modality.codebook_size
    starts = range(modality.first, modality.end, size)
    return tuple(Allowed(start, start + size) for start in starts)


def codes_of(tokens: Array, modality: Modality, rank: int) -> Array:
    """int32 [prod(grid)] tokens -> int32 codes as the decoder takes them: [1, *grid], or [1, K, *rest] for K > 1.

    `rank` is the decoder's: one with an axis for a single codebook gets [1, 1, *grid].

    Raises RuntimeInputError for a wrong number of tokens or a token outside its codebook.
    """
    if tokens.size != modality.length:
        raise RuntimeInputError(
            f"{tokens.size} tokens do not fill the grid {list(modality.grid)}", modality.name, f"Give {modality.length}"
        )
    codes = tokens.reshape(modality.grid).astype(np.int32) - modality.first
    if modality.codebooks > 1:
        codes = np.moveaxis(codes - np.arange(modality.codebooks, dtype=np.int32) * modality.codebook_size, -1, 0)
    if codes.min() < 0 or codes.max() >= modality.codebook_size:
        raise RuntimeInputError(
            f"a token is outside its codebook of {modality.codebook_size}",
            modality.name,
            f"Give tokens of {modality.name} alone, those of codebook after codebook",
        )
    codes = codes[None] if codes.ndim + 2 <= rank else codes
    return np.ascontiguousarray(codes[None])


def tokens_of(codes: Array, modality: Modality) -> Array:
    """The reverse of `codes_of`: an encoder's codes, int32 [1, *grid] or [1, K, *rest] -> int32 [prod(grid)] tokens."""
    grid = codes[0]
    if modality.codebooks > 1:
        grid = np.moveaxis(grid, 0, -1) + np.arange(modality.codebooks, dtype=np.int32) * modality.codebook_size
    if grid.size != modality.length:
        raise RuntimeInputError(
            f"codes of shape {list(grid.shape)} do not fit the grid {list(modality.grid)}",
            modality.name,
            f"Give {modality.length} codes",
        )
    tokens: Array = (grid + modality.first).astype(np.int32).reshape(-1)
    return tokens
