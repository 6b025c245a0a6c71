"""Step `student`: distil the student from the teacher's logits.

The loss is `alpha * CE + (1 - alpha) * T^2 * KL(teacher || student)` at temperature T (Hinton et al.
2015, arXiv:1503.02531); `--loss logit-mse` replaces the second term by the squared difference of
the centred logits (Ba and Caruana 2014, arXiv:1312.6184).
"""

from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from tools.reference_student import lm, teacher, typical, vocabulary
from tools.reference_student.training import arguments, fit

CHECKPOINTS = {
    "images": "student_images.pt",
    "all": "student_all.pt",
    "distil": "student_distilled.pt",
    "tune": "student.pt",
}
PREDECESSORS = {"all": "images", "tune": "distil"}
SIZES = {"images": lm.IMAGES_FIRST, "all": lm.ALL_TASKS, "tune": typical.SIZES}


def distance(student: torch.Tensor, target: torch.Tensor, form: str, temperature: float) -> torch.Tensor:
    """Per-position distance [m] of student and teacher logits [m, V] in the chosen form ("kl" or "logit-mse")."""
    if form == "kl":
        divergence = F.kl_div(
            F.log_softmax(student / temperature, -1),
            F.log_softmax(target / temperature, -1),
            reduction="none",
            log_target=True,
        )
        return divergence.sum(-1) * temperature**2
    # A constant added to all logits changes no probability, so it is taken out first.
    centred = (student - student.mean(-1, keepdim=True)) - (target - target.mean(-1, keepdim=True))
    return centred.square().mean(-1)


def supervise(work: Path, stage: str, steps: int, peak: float, compiled: bool) -> LlamaForCausalLM:
    """Train on the data alone: image tasks ("images"), all four ("all"), or mostly generation ("tune", the last)."""
    words = vocabulary.load(work / "tokenizer")
    model = lm.student(words)
    if stage in PREDECESSORS:
        start = torch.load(work / CHECKPOINTS[PREDECESSORS[stage]], weights_only=True)
        model.load_state_dict(start["model"])
    rows = (typical.TypicalRows if stage == "tune" else lm.Rows)(work, words)
    reader, sizes = lm.Reader(model, compiled), SIZES[stage]
    return fit(
        model,
        lambda _step: lm.supervised(reader, rows, sizes),
        work / CHECKPOINTS[stage],
        steps,
        peak,
        weight_decay=0.02,
        save_every=100,
    )


def distil(
    work: Path, steps: int, peak: float, form: str, alpha: float, temperature: float, compiled: bool
) -> LlamaForCausalLM:
    """Distil, starting from the warmed-up student; leaves `work/student_distilled.pt`."""
    words = vocabulary.load(work / "tokenizer")
    model, guide = lm.student(words), teacher.load(work)
    model.load_state_dict(torch.load(work / CHECKPOINTS["all"], weights_only=True)["model"])
    reader, guide_reader, rows = lm.Reader(model, compiled), lm.Reader(guide, compiled), lm.Rows(work, words)

    def loss(_step: int) -> dict[str, torch.Tensor]:
        batch = rows.batch(lm.ALL_TASKS)
        with torch.no_grad():
            target = guide_reader.logits(batch)
        logits = reader.logits(batch)
        hard = lm.cross_entropy(logits, batch)
        soft = (distance(logits, target, form, temperature) * batch.weights).sum() / batch.weights.sum()
        return {"loss": alpha * hard + (1 - alpha) * soft, "soft": soft, **lm.figures(logits, batch)}

    return fit(model, loss, work / CHECKPOINTS["distil"], steps, peak, weight_decay=0.02, save_every=100)


def load(work: Path) -> LlamaForCausalLM:
    """The distilled student rounded to float16 (what the float package holds), computing in float32."""
    model = lm.student(vocabulary.load(work / "tokenizer"))
    state = torch.load(work / CHECKPOINTS["tune"], weights_only=True)["model"]
    model.load_state_dict({name: value.half().float() for name, value in state.items()})
    return model.eval()


def main() -> None:
    """Warm up or distil the student."""
    options = arguments(
        __doc__,
        stage={
            "choices": tuple(CHECKPOINTS),
            "required": True,
            "help": "the first two warm up without a teacher and can run beside it",
        },
        steps={"type": int, "default": 3000},
        rate={"type": float, "default": 3e-3},
        loss={"choices": ("kl", "logit-mse"), "default": "kl"},
        alpha={"type": float, "default": 0.4, "help": "share of the cross-entropy"},
        temperature={"type": float, "default": 1.5},
        eager={"action": "store_true", "help": "do not compile the backbones (no C++ compiler needed, slower)"},
    )
    if options.stage != "distil":
        supervise(options.work, options.stage, options.steps, options.rate, not options.eager)
    else:
        distil(
            options.work,
            options.steps,
            options.rate,
            options.loss,
            options.alpha,
            options.temperature,
            not options.eager,
        )


if __name__ == "__main__":
    main()
