"""Training rows for the last stage: generation is learnt from the most typical signals alone.

A model of this size spreads itself thin over every way of writing a seven. What it is to make should be recognised,
so it learns to make those training signals that the judge, after the discretizer's round trip, is most sure of;
reading still learns from everything.
"""

from dataclasses import replace
from pathlib import Path

import torch

from tools.reference_student import audio_codec, image_codec, judges, lm, vocabulary
from tools.reference_student.data import PEAK

#: Share of each digit's training signals that are typical.
SHARES = {"image": 0.5, "audio": 0.7}
#: How often a typical utterance is drawn in a mildly distorted version.
DISTORTED = 0.3
SIZES = {"text_to_image": 28, "image_to_text": 6, "text_to_audio": 24, "audio_to_text": 6}


@torch.no_grad()
def confidence(work: Path, kind: str, codes: torch.Tensor) -> torch.Tensor:
    """The judge's probabilities [n, 10] for the signals that codes [n, length] decode to."""
    judge, parts = judges.load(kind, work / "judges"), []
    if kind == "image":
        images = image_codec.load(work)
        for part in codes.long().split(250):
            pixels = image_codec.decode(images, part.reshape(-1, image_codec.GRID, image_codec.GRID))
            parts.append(judge((pixels * image_codec.STD + image_codec.MEAN).clamp(0, 1)).softmax(-1))
    else:
        sounds = audio_codec.load(work)
        for part in codes.long().split(100):
            frames = part.reshape(len(part), -1, audio_codec.CODEBOOKS).transpose(1, 2)
            wave = audio_codec.decode(sounds, frames).reshape(len(part), -1)
            wave = wave * (PEAK / wave.abs().amax(1, keepdim=True).clamp_min(1e-6))
            parts.append(judge(judges.sound_planes(wave)).softmax(-1))
    return torch.cat(parts)


class TypicalRows(lm.Rows):
    """Rows whose generated signals are typical ones."""

    def __init__(self, work: Path, words: vocabulary.Vocabulary) -> None:
        super().__init__(work, words)
        self.typical = {kind: self._select(work, kind) for kind in self.labels}

    def _select(self, work: Path, kind: str) -> torch.Tensor:
        """Row numbers of the typical signals, the same share of every digit."""
        labels = self.labels[kind].long()
        sure = confidence(work, kind, self.banks[kind]["plain"][0])[torch.arange(len(labels)), labels]
        kept = []
        for digit in range(10):
            rows = torch.nonzero(labels == digit).flatten()
            best = sure[rows].argsort(descending=True)[: int(len(rows) * SHARES[kind])]
            kept.append(rows[best])
        return torch.cat(kept)

    def row(self, task: str) -> tuple[list[int], list[float]]:
        source, target = task.split("_to_")
        if source != "text":
            return super().row(task)
        kept, v = self.typical[target], self.vocabulary
        chosen = int(kept[int(torch.randint(0, len(kept), ()))])
        distorted = target == "audio" and float(torch.rand(())) < DISTORTED
        versions = self.banks[target]["mild" if distorted else "plain"]
        codes = versions[int(torch.randint(0, len(versions), ())), chosen]
        choices = self.prompts[target][int(self.labels[target][chosen])]
        text = choices[int(torch.randint(0, len(choices), ()))]
        body = lm.wrapped(v, target, codes)
        weights = [0.0] + [lm.PROMPT] * len(text) + [lm.CODES] * (len(body) - 1) + [0.3, 0.3]
        return [v.bos, *text, *body, v.eos], weights

    def batch(self, sizes: dict[str, int]) -> lm.Batch:
        batch = super().batch(sizes)
        return replace(batch, weights=batch.weights.clamp(max=lm.TUNED_ANSWER))
