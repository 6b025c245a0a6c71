"""Step `teacher`: train the larger language model with cross-entropy, on the image tasks first and then on all four.

The image stage needs no audio codec, so it can run while that one still trains.
"""

from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from tools.reference_student import lm, typical, vocabulary
from tools.reference_student.training import arguments, fit

CHECKPOINTS = {"images": "teacher_images.pt", "all": "teacher.pt", "tune": "teacher_tuned.pt"}
PREDECESSORS = {"all": "images", "tune": "all"}
SIZES = {"images": lm.IMAGES_FIRST, "all": lm.ALL_TASKS, "tune": typical.SIZES}


def train(work: Path, stage: str, steps: int, peak: float, compiled: bool) -> LlamaForCausalLM:
    """Train one stage ("images" or "all") and leave its checkpoint; "all" starts from "images"."""
    words = vocabulary.load(work / "tokenizer")
    model = lm.teacher(words)
    if stage in PREDECESSORS:
        model.load_state_dict(torch.load(work / CHECKPOINTS[PREDECESSORS[stage]], weights_only=True)["model"])
    rows = (typical.TypicalRows if stage == "tune" else lm.Rows)(work, words)
    reader, sizes = lm.Reader(model, compiled), SIZES[stage]
    return fit(
        model,
        lambda _step: lm.supervised(reader, rows, sizes),
        work / CHECKPOINTS[stage],
        steps,
        peak,
        weight_decay=0.05,
        save_every=100,
    )


def load(work: Path, stage: str = "all") -> LlamaForCausalLM:
    """The teacher after a stage ("all" is what the student is distilled from), float32, in eval mode."""
    model = lm.teacher(vocabulary.load(work / "tokenizer"))
    model.load_state_dict(torch.load(work / CHECKPOINTS[stage], weights_only=True)["model"])
    return model.eval()


def main() -> None:
    """Train one stage of the teacher."""
    options = arguments(
        __doc__,
        stage={"choices": tuple(CHECKPOINTS), "required": True},
        steps={"type": int, "default": 2500},
        rate={"type": float, "default": 2e-3},
        eager={"action": "store_true", "help": "do not compile the backbone (no C++ compiler needed, slower)"},
    )
    train(options.work, options.stage, options.steps, options.rate, not options.eager)


if __name__ == "__main__":
    main()
