"""A copy of the tiny student that a test may damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.malformed.packages import copy_package


@pytest.fixture
def package(tiny_student: Path, tmp_path: Path) -> Path:
    """The int4 package, copied."""
    return copy_package(tiny_student, tmp_path / "package")
