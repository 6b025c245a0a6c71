"""Step `critic`: a digit classifier whose inner features tell the audio codec what in a sound matters.

A perceptual loss in the sense of Johnson et al. 2016 (arXiv:1603.08155). It has another seed, another
spectrogram and another training length than the speech judge, and no figure is measured with it, so
the judge stays an independent witness. It is not shipped.
"""

from pathlib import Path

import torch
from torch.nn import functional as F

from tools.reference_student import augment
from tools.reference_student.data import audio_batch, load_split
from tools.reference_student.judges import Judge
from tools.reference_student.spectrum import log_mel
from tools.reference_student.training import SEED, arguments, fit


def planes(sounds: torch.Tensor) -> torch.Tensor:
    """float [n,L] -> normalised log-mel planes [n,1,32,frames] of 64 ms windows."""
    return (log_mel(sounds, 512, 128, 32)[:, None] + 4.0) / 2.5


def train(work: Path, steps: int) -> Judge:
    """Train and leave the checkpoint `work/critic.pt`."""
    split = load_split(work, "train")
    samples, labels = torch.from_numpy(audio_batch(split.recordings)), torch.from_numpy(split.recording_labels)
    torch.manual_seed(SEED + 100)
    model = Judge()

    def loss(_step: int) -> dict[str, torch.Tensor]:
        rows = torch.randint(0, len(samples), (48,))
        logits = model(planes(augment.sounds(samples[rows])[:, 0]))
        accuracy = (logits.argmax(1) == labels[rows]).float().mean()
        return {"loss": F.cross_entropy(logits, labels[rows], label_smoothing=0.1), "accuracy": accuracy}

    return fit(model, loss, work / "critic.pt", steps, 3e-3, weight_decay=0.02)


def load(work: Path) -> Judge:
    """The trained critic, frozen."""
    model = Judge()
    model.load_state_dict(torch.load(work / "critic.pt", weights_only=True)["model"])
    return model.eval().requires_grad_(False)


def distance(model: Judge, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean relative L1 distance of the three stages' features and the logits; sounds float [n,L]."""
    made, wanted = planes(output), planes(target)
    total = torch.zeros(())
    for stage in model.stages:
        made, wanted = stage(made), stage(wanted).detach()
        total = total + F.l1_loss(made, wanted) / wanted.abs().mean()
    pooled = [torch.cat([part.mean((2, 3)), part.amax((2, 3))], 1) for part in (made, wanted)]
    return total + F.l1_loss(model.head(pooled[0]), model.head(pooled[1]))


def main() -> None:
    """Train the critic."""
    options = arguments(__doc__, steps={"type": int, "default": 700})
    train(options.work, options.steps)


if __name__ == "__main__":
    main()
