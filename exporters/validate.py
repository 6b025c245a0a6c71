"""Checks a delivery package, as a build would before it starts.

    python -m exporters.validate DIR       # what it holds, or what is wrong with it
    python -m exporters.validate --schema  # the JSON schema of package.json

exporters/package.py documents the format.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from exporters import console
from exporters.errors import ExportError
from exporters.package_schema import Manifest


def describe(folder: Path) -> str:
    """One line per part of a sound package. Raises ExportError naming the file or field that is not."""
    from exporters.student import load_student

    student = load_student(folder)
    lines = [
        f"{student.name} {student.version} ({student.license}), sha256 {student.sha256}",
        f"language model: {student.config['model_type']}, vocabulary {student.config['vocab_size']}, "
        f"{len(student.quantized)} quantised and {len(student.tensors)} float tensors",
    ]
    for name, modality in student.modalities.items():
        layout = f", {modality.codebooks} x {modality.codebook_size} codes, grid {list(modality.grid)}"
        lines.append(f"{name}: tokens {modality.first}..{modality.end - 1}{layout if modality.grid else ''}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: 0 for a sound package, 2 with one message for any other."""
    parser = argparse.ArgumentParser(
        prog="python -m exporters.validate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("folder", type=Path, nargs="?", help="delivery package or transformers checkpoint folder")
    what.add_argument("--schema", action="store_true", help="print the JSON schema of package.json")
    options = parser.parse_args(arguments)
    if options.schema:
        print(json.dumps(Manifest.model_json_schema(), indent=1))
        return 0
    try:
        print(describe(options.folder))
        return 0
    except ExportError as problem:
        console.error(problem)
        return 2


if __name__ == "__main__":
    sys.exit(main())
