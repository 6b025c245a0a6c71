"""The shipped reference student as a complete delivery package folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from exporters.errors import PackageError

#: Made by tools/reference_student.
DATA = Path(__file__).parent / "reference_student"
VARIANTS = ("int4", "int8", "float")


def assemble(variant: str, destination: str | Path, source: Path = DATA) -> Path:
    """Copies the files that all variants share and those of ``variant`` into a new or empty folder; returns it.

    The variant's package.json covers every file with its hash, so the result validates as one unit.

    Raises:
        PackageError: an unknown variant, a folder that is not empty, or a distribution without the student.
    """
    destination = Path(destination)
    if variant not in VARIANTS:
        raise PackageError(
            f"no variant {variant!r}", where="reference student", way_out=f"There are: {', '.join(VARIANTS)}"
        )
    if not (source / variant).is_dir():
        raise PackageError(
            "the reference student is not there",
            where=str(source / variant),
            way_out="Install the project again, or name a package with --package.",
        )
    if destination.exists() and any(destination.iterdir()):
        raise PackageError("is not empty", where=str(destination), way_out="Name a new folder.")
    for part in ("shared", variant):
        shutil.copytree(source / part, destination, dirs_exist_ok=True, copy_function=shutil.copyfile)
    return destination
