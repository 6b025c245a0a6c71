"""Memory that is mapped while a model loads is moved into huge pages, with what it holds."""

from __future__ import annotations

import mmap
import platform
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from runtimes.huge_pages import LEAST, Block, HugePages, _page_bytes, _without

SIZE = 8 << 20


def huge_bytes(address: int) -> int:
    """Bytes in huge pages of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    return 0


def mapped() -> np.ndarray:
    """Written memory in pages of its own."""
    values = np.frombuffer(mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint32)
    values[:] = np.arange(values.size)
    return values


def has_collapse() -> bool:
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    known = platform.system() == "Linux" and release is not None and (int(release[1]), int(release[2])) >= (6, 1)
    return known and _page_bytes() > 0


@pytest.mark.skipif(not has_collapse(), reason="this system's kernel has no MADV_COLLAPSE, or huge pages are off")
def test_what_is_mapped_within_is_moved_and_keeps_its_contents() -> None:
    older = mapped()
    pages = HugePages(LEAST)
    values = mapped()
    before = huge_bytes(values.ctypes.data + SIZE // 2)
    pages.loaded()
    assert huge_bytes(values.ctypes.data + SIZE // 2) == before  # whoever loads the next model is not held back
    pages.wait()
    middle = values.ctypes.data + SIZE // 2
    assert huge_bytes(middle) >= SIZE // 2
    np.testing.assert_array_equal(values, np.arange(values.size))
    np.testing.assert_array_equal(older, values)


@pytest.mark.skipif(not has_collapse(), reason="this system's kernel has no MADV_COLLAPSE, or huge pages are off")
def test_what_is_given_back_is_not_moved() -> None:
    pages = HugePages(LEAST)
    values = mapped()
    before = huge_bytes(values.ctypes.data + SIZE // 2)
    pages.loaded()
    pages.cancel()
    pages.wait()
    assert huge_bytes(values.ctypes.data + SIZE // 2) == before


def test_a_small_model_starts_no_thread() -> None:
    before = threading.active_count()
    pages = HugePages(LEAST - 1)
    pages.loaded()
    assert threading.active_count() == before
    pages.wait()
    pages.cancel()


@pytest.mark.parametrize(
    ("blocks", "others", "left"),
    [
        ([(10, 20)], [], [(10, 20)]),
        ([(10, 20)], [(10, 20)], []),
        ([(10, 20)], [(5, 12)], [(12, 20)]),
        ([(10, 20)], [(12, 14), (18, 25)], [(10, 12), (14, 18)]),
        ([(10, 20), (30, 40)], [(0, 10), (20, 30)], [(10, 20), (30, 40)]),
        ([(10, 40)], [(20, 30)], [(10, 20), (30, 40)]),
    ],
)
def test_only_what_is_new_is_taken(blocks: list[Block], others: list[Block], left: list[Block]) -> None:
    assert _without(blocks, others) == left
