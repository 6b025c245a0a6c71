"""Tokens <-> codes: both layouts by hand, the round trip, and what does not fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes.bundle import Modality
from runtimes.sampling import Allowed
from runtimes.session import RuntimeInputError
from runtimes.tokens import allowed_codes, codes_of, tokens_of


def modality(grid: tuple[int, ...], codebooks: int = 1, size: int = 16, first: int = 100) -> Modality:
    return Modality("m", first, first + codebooks * size, codebooks, size, grid, 1, 2, {})


def test_an_image_is_row_major() -> None:
    codes = codes_of(np.arange(100, 106, dtype=np.int32), modality((2, 3)), rank=3)
    assert codes.tolist() == [[[0, 1, 2], [3, 4, 5]]]
    assert codes.dtype == np.int32


def test_a_sound_has_its_codebooks_side_by_side_in_tokens_and_apart_in_codes() -> None:
    sound = modality((3, 2), codebooks=2)
    # (t, k) -> 100 + 16 k + code, with code = 10 t + k
    tokens = np.array([100, 117, 110, 127, 105, 116], np.int32)
    assert codes_of(tokens, sound, rank=3).tolist() == [[[0, 10, 5], [1, 11, 0]]]
    assert allowed_codes(sound) == (Allowed(100, 116), Allowed(116, 132))


def test_a_decoder_with_an_axis_for_one_codebook_gets_it() -> None:
    assert codes_of(np.array([100, 103], np.int32), modality((2,)), rank=3).tolist() == [[[0, 3]]]


@given(st.sampled_from([((4, 5), 1, 3), ((7, 3), 3, 3), ((2, 3, 2), 2, 4), ((6,), 1, 3)]), st.integers(0, 1000))
def test_round_trip(case: tuple[tuple[int, ...], int, int], seed: int) -> None:
    grid, codebooks, rank = case
    kind = modality(grid, codebooks)
    starts = np.array([allowed.first for allowed in allowed_codes(kind)])
    random = np.random.default_rng(seed)
    tokens = (random.integers(0, 16, kind.length) + np.tile(starts, kind.length // codebooks)).astype(np.int32)
    codes = codes_of(tokens, kind, rank)
    assert codes.ndim == rank
    np.testing.assert_array_equal(tokens_of(codes, kind), tokens)


@pytest.mark.parametrize("tokens", [[100] * 5, [100] * 7, []], ids=["short", "long", "none"])
def test_a_wrong_number_of_tokens_is_refused(tokens: list[int]) -> None:
    with pytest.raises(RuntimeInputError, match=r"do not fill the grid \[2, 3\]"):
        codes_of(np.array(tokens, np.int32), modality((2, 3)), rank=3)


@pytest.mark.parametrize("token", [99, 116])
def test_a_token_outside_the_codebook_is_refused(token: int) -> None:
    with pytest.raises(RuntimeInputError, match="outside its codebook"):
        codes_of(np.array([100, token], np.int32), modality((2,)), rank=2)


def test_a_token_of_the_wrong_codebook_is_refused() -> None:
    with pytest.raises(RuntimeInputError, match="outside its codebook"):
        codes_of(np.array([116, 100], np.int32), modality((1, 2), codebooks=2), rank=3)


def test_codes_of_another_grid_are_refused() -> None:
    with pytest.raises(RuntimeInputError, match="do not fit the grid"):
        tokens_of(np.zeros((1, 3, 3), np.int32), modality((2, 3)))
