"""The next token from a row of logits: greedy, or sampled by temperature, top-k and top-p, within allowed tokens.

Allowed tokens are one contiguous range (a modality, or one codebook of it) and a few single ids (end of sequence).
What is outside can never come out. Greedy takes an argmax over a view, so a token costs no memory of the size of the
vocabulary; sampling works in one scratch buffer that is made once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from runtimes.errors import Fault
from runtimes.output import DECODED

Array = np.ndarray[Any, Any]


class SamplingError(Fault):
    """Settings out of range, or logits from which no token can be taken."""


@dataclass(frozen=True)
class Allowed:
    """Token ids [first, end), and the single ids `also`."""

    first: int
    end: int
    also: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep all. `seed` None draws one from the system."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or 1e-3 <= self.temperature <= 1e3):
            raise SamplingError(
                f"{self.temperature} is neither 0 nor in 0.001..1000",
                "temperature",
                "0 is greedy, 1 is the model's own",
            )
        if self.top_k < 0:
            raise SamplingError(f"{self.top_k} is negative", "top-k", "0 keeps all")
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"{self.top_p} is not in (0, 1]", "top-p", "1 keeps all")
        if self.seed is not None and self.seed < 0:
            raise SamplingError(f"{self.seed} is negative", "seed", "Give 0 or more")


GREEDY = Sampling()


class Sampler:
    """Draws tokens one after another; the same settings and logits give the same tokens."""

    def __init__(self, settings: Sampling, vocab_size: int) -> None:
        self.settings = settings
        self._random = np.random.default_rng(settings.seed)
        self._scratch = np.empty(vocab_size if settings.temperature else 0, np.float64)

    def pick(self, logits: Array, allowed: Allowed) -> int:
        """The next token. `logits` [V] of any float type. Raises SamplingError where they are not finite."""
        token = self._draw(logits, allowed) if self.settings.temperature else self._best(logits, allowed)
        # argmax returns the first NaN, and a NaN or +inf weight leaves no finite draw, so this one look is enough.
        if token < 0 or not np.isfinite(logits[token]):
            raise SamplingError(
                "the logits hold NaN or infinity",
                f"tokens {allowed.first}..{allowed.end - 1}",
                DECODED,
            )
        return token

    def takes(self, candidates: int, allowed: Allowed) -> bool:
        """Whether the largest ``candidates`` logits of the range are enough for `pick_among`."""
        settings = self.settings
        enough = (
            settings.temperature == 0 or 0 < settings.top_k <= candidates or allowed.end - allowed.first <= candidates
        )
        return bool(candidates) and not allowed.also and enough

    def pick_among(self, values: Array, ids: Array) -> int:
        """The next token, from logits [k] and their token ids [k], largest first. Raises as `pick` does."""
        return int(ids[self.pick(values, Allowed(0, len(values)))])

    def _best(self, logits: Array, allowed: Allowed) -> int:
        token = allowed.first + int(logits[allowed.first : allowed.end].argmax())
        for other in allowed.also:
            # `not <=` lets a NaN win here as it does in argmax, so that `pick` refuses it.
            if logits[token] == logits[token] and not logits[other] <= logits[token]:
                token = other
        return token

    def _draw(self, logits: Array, allowed: Allowed) -> int:
        size = allowed.end - allowed.first
        scaled = self._scratch[: size + len(allowed.also)]
        scaled[:size] = logits[allowed.first : allowed.end]
        for i, other in enumerate(allowed.also, size):
            scaled[i] = logits[other]
        top = scaled.max()
        if not np.isfinite(top):
            return -1
        scaled -= top
        scaled /= self.settings.temperature
        chosen = self._choose(scaled)
        return allowed.first + chosen if chosen < size else allowed.also[chosen - size]

    def _choose(self, scaled: Array) -> int:
        """An index drawn in proportion to exp(scaled): of the top_k largest, then of the fewest that hold top_p.

        `scaled` is overwritten.
        """
        settings = self.settings
        keep = None
        if 0 < settings.top_k < scaled.size:
            keep = np.argpartition(scaled, -settings.top_k)[-settings.top_k :]
            scaled = scaled[keep]
        weights = np.exp(scaled, out=scaled)
        if settings.top_p < 1:
            order = np.argsort(-weights, kind="stable")
            total = np.cumsum(weights[order])
            order = order[: int(np.searchsorted(total, settings.top_p * total[-1])) + 1]
            keep, weights = order if keep is None else keep[order], weights[order]
        bounds = np.cumsum(weights)
        # "right" never lands on an index of weight 0, as random() < 1.
        index = int(np.searchsorted(bounds, self._random.random() * bounds[-1], side="right"))
        return index if keep is None else int(keep[index])
