"""Batched generation with transformers' cache: only codes of the wanted modality come out, in the right number."""

from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM

from tools.reference_student.audio_codec import CODEBOOK, CODEBOOKS, FRAMES
from tools.reference_student.image_codec import GRID
from tools.reference_student.vocabulary import TEXT, Vocabulary

ANSWER_TOKENS = 6


@dataclass(frozen=True)
class Sampling:
    """Greedy when the temperature is 0, else sampled among the `top_k` best at that temperature."""

    temperature: float = 0.0
    top_k: int = 50


GREEDY = Sampling()
SAMPLED = Sampling(0.8, 50)


def _choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """Token ids [n] from logits [n, V]; ranges that may not be chosen are -inf."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    best, index = (logits / sampling.temperature).topk(min(sampling.top_k, logits.shape[-1]), -1)
    return index.gather(1, torch.multinomial(best.softmax(-1), 1, generator=generator))[:, 0]


def _ranges(words: Vocabulary, kind: str) -> list[tuple[int, int]]:
    """Allowed ids [first, end) of every generated position."""
    if kind == "image":
        return [(words.image_first, words.audio_first)] * (GRID * GRID)
    if kind == "audio":
        starts = [words.audio_first + index * CODEBOOK for index in range(CODEBOOKS)]
        return [(start, start + CODEBOOK) for _ in range(FRAMES) for start in starts]
    return [(0, TEXT + 2)] * ANSWER_TOKENS


@torch.no_grad()
def generate(
    model: LlamaForCausalLM,
    words: Vocabulary,
    rows: list[list[int]],
    kind: str,
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> torch.Tensor:
    """Continue rows of one common length by a whole signal ("image", "audio") or a short answer ("text").

    Returns ids int64 [n, positions]. Text may hold bos at no place; what follows eos is to be cut.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, cache, made = torch.tensor(rows), None, []
    for first, end in _ranges(words, kind):
        output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        logits = output.logits[:, -1].float()
        allowed = torch.full_like(logits, float("-inf"))
        allowed[:, first:end] = logits[:, first:end]
        if kind == "text":
            allowed[:, words.bos] = float("-inf")
        ids = _choose(allowed, sampling, generator)[:, None]
        made.append(ids)
    return torch.cat(made, 1)


def by_length(rows: list[list[int]]) -> list[list[int]]:
    """Row numbers grouped so that each group's rows have one length."""
    groups: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(len(row), []).append(number)
    return list(groups.values())


def generate_any(
    model: LlamaForCausalLM,
    words: Vocabulary,
    rows: list[list[int]],
    kind: str,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    batch: int = 100,
) -> torch.Tensor:
    """Like `generate`, for rows of any lengths, in batches."""
    result: torch.Tensor | None = None
    for group in by_length(rows):
        for start in range(0, len(group), batch):
            part = group[start : start + batch]
            made = generate(model, words, [rows[number] for number in part], kind, sampling, seed + start)
            result = torch.zeros(len(rows), made.shape[1], dtype=torch.long) if result is None else result
            result[part] = made
    return result


def image_codes(words: Vocabulary, ids: torch.Tensor) -> torch.Tensor:
    """Generated ids [n,64] -> codes [n,8,8]."""
    return (ids - words.image_first).reshape(-1, GRID, GRID)


def audio_codes(words: Vocabulary, ids: torch.Tensor) -> torch.Tensor:
    """Generated ids [n,80] -> codes [n,4,20]."""
    return ((ids - words.audio_first) % CODEBOOK).reshape(-1, FRAMES, CODEBOOKS).transpose(1, 2)
