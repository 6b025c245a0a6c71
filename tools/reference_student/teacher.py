"""Step `teacher`: train the larger language model on the four tasks with cross-entropy."""

from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from tools.reference_student import lm, vocabulary
from tools.reference_student.training import arguments, fit


def train(work: Path, steps: int, peak: float, compiled: bool) -> LlamaForCausalLM:
    """Train and leave the checkpoint `work/teacher.pt`."""
    words = vocabulary.load(work / "tokenizer")
    model = lm.teacher(words)
    reader, rows = lm.Reader(model, compiled), lm.Rows(work, words)

    def loss(step: int) -> dict[str, torch.Tensor]:
        batch = rows.batch(lm.BATCH)
        logits = reader.logits(batch)
        with torch.no_grad():
            codes, accuracy = lm.code_loss(logits, batch), lm.answer_accuracy(logits, batch)
        return {"loss": lm.cross_entropy(logits, batch), "codes": codes, "answers": accuracy}

    return fit(model, loss, work / "teacher.pt", steps, peak, weight_decay=0.05, save_every=250)


def load(work: Path) -> LlamaForCausalLM:
    """The trained teacher, float32, in eval mode."""
    model = lm.teacher(vocabulary.load(work / "tokenizer"))
    model.load_state_dict(torch.load(work / "teacher.pt", weights_only=True)["model"])
    return model.eval()


def main() -> None:
    """Train the teacher."""
    options = arguments(
        __doc__,
        steps={"type": int, "default": 3600},
        rate={"type": float, "default": 2e-3},
        eager={"action": "store_true", "help": "do not compile the backbone (no C++ compiler needed, slower)"},
    )
    train(options.work, options.steps, options.rate, not options.eager)


if __name__ == "__main__":
    main()
