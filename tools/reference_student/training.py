"""What every training step shares: arguments, a resumable seeded loop, and learning-rate schedule."""

import argparse
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

SEED = 7


def arguments(description: str, **extra: dict) -> argparse.Namespace:
    """Parse `--data`, `--work` and the step's own options; creates the work folder."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with mnist/ and fsdd/")
    parser.add_argument(
        "--work", type=Path, default=Path("build/reference_student"), help="checkpoints and intermediate files"
    )
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    for name, settings in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    return options


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def save_atomically(value: object, path: Path) -> None:
    """torch.save through a sibling file, so that a killed run leaves the old checkpoint."""
    temporary = path.with_suffix(".tmp")
    torch.save(value, temporary)
    os.replace(temporary, path)


def fit(
    model: nn.Module,
    loss: Callable[[int], dict[str, torch.Tensor]],
    path: Path,
    steps: int,
    peak: float,
    *,
    weight_decay: float = 0.01,
    after_step: Callable[[int], None] | None = None,
    report_every: int = 100,
    save_every: int = 500,
) -> nn.Module:
    """Train `model` in place with AdamW and return it; resumes from `path` when it exists.

    `loss(step)` returns named scalar tensors of which "loss" is minimised. Every step seeds
    torch from its own number, so an interrupted run and an uninterrupted one agree.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=weight_decay)
    first, spent = 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, spent = saved["step"], saved["seconds"]
    model.train()
    started = time.monotonic() - spent
    for step in range(first, steps):
        torch.manual_seed(SEED * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        values = loss(step)
        optimizer.zero_grad(set_to_none=True)
        values["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if after_step:
            after_step(step)
        if (step + 1) % report_every == 0:
            figures = " ".join(f"{name} {float(value.detach()):.4f}" for name, value in values.items())
            print(f"{path.stem} step {step + 1}/{steps} {time.monotonic() - started:.0f}s {figures}", flush=True)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save_atomically(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                    "seconds": time.monotonic() - started,
                },
                path,
            )
    return model.eval()
