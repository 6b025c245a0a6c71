"""The language models and their training rows: four tasks, one vocabulary, loss where it teaches."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from tools.reference_student import tokens
from tools.reference_student.audio_codec import CODEBOOK, CODEBOOKS
from tools.reference_student.vocabulary import AUDIO_PROMPTS, IMAGE_PROMPTS, WORDS, Vocabulary, prompts

CONTEXT = 256
TASKS = ("text_to_image", "image_to_text", "text_to_audio", "audio_to_text")
# Loss weights: an answer is one or two tokens among 80, so each counts more.
ANSWER, CODES, READ_CODES, PROMPT = 20.0, 1.0, 0.4, 0.05
# In the last stage answers are known already, and generation is what is left to learn.
TUNED_ANSWER = 8.0
# Codes that are only read teach little more than codes that are made, so a fourth of them carry loss.
READ_SHARE = 0.25
# One length for all batches of a curriculum, so that the compiled backbone has one shape:
# bos, up to 10 prompt tokens, 66 or 82 for the signal, eos.
IMAGES_FIRST = {"text_to_image": 28, "image_to_text": 36}
ALL_TASKS = {"text_to_image": 14, "image_to_text": 18, "text_to_audio": 16, "audio_to_text": 16}
IMAGE_LENGTH, LENGTH = 80, 96


def build(vocabulary: Vocabulary, hidden: int, layers: int, intermediate: int) -> LlamaForCausalLM:
    """A llama decoder with head size 32, three query heads for each key/value head, tied embeddings."""
    heads = hidden // 32
    config = LlamaConfig(
        vocab_size=vocabulary.size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 3),
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=vocabulary.bos,
        eos_token_id=vocabulary.eos,
        pad_token_id=vocabulary.pad,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def student(vocabulary: Vocabulary) -> LlamaForCausalLM:
    """The student: 1.45 M parameters."""
    return build(vocabulary, hidden=192, layers=4, intermediate=320)


def teacher(vocabulary: Vocabulary) -> LlamaForCausalLM:
    """The teacher: 2.7 M parameters."""
    return build(vocabulary, hidden=256, layers=4, intermediate=512)


def wrapped(vocabulary: Vocabulary, kind: str, codes: torch.Tensor) -> list[int]:
    """Token ids of `<image> codes </image>` (or audio) for codes int16 [length]."""
    if kind == "image":
        return [vocabulary.image_begin, *(codes.long() + vocabulary.image_first).tolist(), vocabulary.image_end]
    offset = torch.arange(len(codes)) % CODEBOOKS * CODEBOOK + vocabulary.audio_first
    return [vocabulary.audio_begin, *(codes.long() + offset).tolist(), vocabulary.audio_end]


@dataclass(frozen=True)
class Batch:
    """ids int64 [n, L] right-padded; the m places of the flat [n, L-1] predictions with loss, targets, weights."""

    ids: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


class Rows:
    """Draws training rows; the randomness is torch's global generator, seeded by each step."""

    def __init__(self, work: Path, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        arrays = tokens.load(work)
        self.labels = {
            kind: arrays[f"train.{kind}.labels"] for kind in tokens.MODALITIES if f"train.{kind}.labels" in arrays
        }
        self.banks = {
            kind: {name: arrays[f"train.{kind}.{name}"] for name in tokens.VERSIONS[kind]} for kind in self.labels
        }
        self.prompts = {
            kind: [[vocabulary.encode(text) for text in prompts(templates, digit)] for digit in range(10)]
            for kind, templates in (("image", IMAGE_PROMPTS), ("audio", AUDIO_PROMPTS))
        }
        self.answers = [vocabulary.encode(word) for word in WORDS]

    def _codes(self, kind: str, bank: str) -> tuple[torch.Tensor, int]:
        versions = self.banks[kind][bank]
        version, row = int(torch.randint(0, versions.shape[0], ())), int(torch.randint(0, versions.shape[1], ()))
        return versions[version, row], int(self.labels[kind][row])

    def row(self, task: str) -> tuple[list[int], list[float]]:
        """One sequence and its loss weights (weight i belongs to predicting token i)."""
        source, target = task.split("_to_")
        v = self.vocabulary
        if target == "text":
            bank = "strong" if torch.rand(()) < 0.75 else "mild"
            codes, digit = self._codes(source, bank)
            body, answer = wrapped(v, source, codes), self.answers[digit]
            return [v.bos, *body, *answer, v.eos], [0.0] + [PROMPT] + [READ_CODES] * (len(body) - 1) + [ANSWER] * len(
                answer
            ) + [1.0]
        codes, digit = self._codes(target, "plain" if torch.rand(()) < 0.3 else "mild")
        choices = self.prompts[target][digit]
        text = choices[int(torch.randint(0, len(choices), ()))]
        body = wrapped(v, target, codes)
        return [v.bos, *text, *body, v.eos], [0.0] + [PROMPT] * len(text) + [CODES] * (len(body) - 1) + [0.3, 0.3]

    def batch(self, sizes: dict[str, int]) -> Batch:
        """Rows of every task, `sizes[task]` of each."""
        rows = [self.row(task) for task, count in sizes.items() for _ in range(count)]
        length = LENGTH if any("audio" in task for task in sizes) else IMAGE_LENGTH
        ids = torch.full((len(rows), length), self.vocabulary.pad)
        weights = torch.zeros(len(rows), length)
        for place, (row, weight) in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
            weights[place, : len(row)] = torch.tensor(weight)
        weights[(weights == READ_CODES) & (torch.rand(weights.shape) > READ_SHARE)] = 0.0
        places = torch.nonzero(weights[:, 1:].flatten()).flatten()
        return Batch(ids, places, ids[:, 1:].flatten()[places], weights[:, 1:].flatten()[places])


class Reader:
    """Runs a model on a batch: bfloat16 matrix products, logits only where the loss looks."""

    def __init__(self, model: LlamaForCausalLM, compiled: bool) -> None:
        self.model = model
        self.backbone = torch.compile(self._hidden) if compiled else self._hidden

    def _hidden(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model.model(ids, use_cache=False).last_hidden_state

    def logits(self, batch: Batch) -> torch.Tensor:
        """float32 [m, vocabulary] at the batch's places."""
        hidden = self.backbone(batch.ids)[:, :-1].flatten(0, 1)[batch.places]
        with torch.autocast("cpu", torch.bfloat16):
            return self.model.lm_head(hidden).float()


def cross_entropy(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Weighted mean cross-entropy in nats of logits [m, V]."""
    return (F.cross_entropy(logits, batch.targets, reduction="none") * batch.weights).sum() / batch.weights.sum()


def answer_accuracy(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Share of answer tokens that the logits [m, V] rank first."""
    chosen = batch.weights >= TUNED_ANSWER
    return (logits.argmax(-1) == batch.targets)[chosen].float().mean()


def code_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the generated codes alone."""
    chosen = batch.weights == CODES
    return F.cross_entropy(logits[chosen], batch.targets[chosen])


@torch.no_grad()
def figures(logits: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
    """What a training log shows beside the loss."""
    return {"codes": code_loss(logits, batch), "answers": answer_accuracy(logits, batch)}


def supervised(reader: Reader, rows: Rows, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """One batch's cross-entropy and figures, for training without a teacher."""
    batch = rows.batch(sizes)
    logits = reader.logits(batch)
    return {"loss": cross_entropy(logits, batch), **figures(logits, batch)}
