"""What each way of quantising costs the float reference student: figures for the README, from one command.

    python -m tools.quantise_table

Calibrated and measured on the package's own samples, every fourth row of which nothing is fitted to. Writes
tools/measurements/quantise.json; `python -m tools.readme_tables` makes the table of it.
"""

from __future__ import annotations

import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from device_profiles.quantise import RECIPES, Quantise
from exporters.quantise import quantise
from exporters.quantise.calibration import load_calibration
from exporters.reference import assemble
from exporters.student import load_student
from tools.readme_tables import MEASUREMENTS

#: Quality budgets in nats that are shown beside the plain methods.
BUDGETS = (("int4-gptq", 0.02), ("int4-gptq", 0.005))


def measure() -> dict[str, Any]:
    """The figures of every recipe, and of the budgets."""
    torch.set_num_threads(1)  # matrices as small as these take longer to share out than to multiply
    rows = []
    with tempfile.TemporaryDirectory(prefix="quantise-") as name:
        folder = Path(name)
        student = load_student(assemble("float", folder / "student"))
        calibration = load_calibration(student, None)
        for index, (recipe, budget) in enumerate([*((recipe, None) for recipe in RECIPES), *BUDGETS]):
            method, bits, activations = RECIPES[recipe]
            settings = Quantise(method=method, bits=bits, activations=activations, mean_kl=budget)
            made = quantise(student, settings, calibration, folder / str(index), lambda stage, size: None)
            counts = {form: sum(row.stored == form for row in made.matrices) for form in _forms(made.matrices)}
            size = sum(row.bytes for row in made.matrices)
            rows.append({"recipe": recipe, "budget": budget, "mean_kl": made.mean_kl, "bytes": size, "stored": counts})
    return {
        "command": "python -m tools.quantise_table",
        "date": datetime.now(UTC).date().isoformat(),
        "student": f"{student.name} {student.version}",
        "rows": rows,
    }


def _forms(matrices: Any) -> list[str]:
    return list(dict.fromkeys(row.stored for row in matrices))


def main() -> None:
    """Command line of this module."""
    text = json.dumps(measure(), indent=1) + "\n"
    (MEASUREMENTS / "quantise.json").write_text(text)


if __name__ == "__main__":
    main()
