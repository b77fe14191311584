"""Sequences that say a thing twice: which, what of them, and nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nirvana.repetition import with_repetition


def test_a_hand_case() -> None:
    ids = np.arange(1, 13).reshape(2, 6)
    assert with_repetition(ids, 0.5).tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 8, 9]]
    assert with_repetition(ids[:, :5], 1.0).tolist() == [[1, 2, 3, 2, 3], [7, 8, 9, 8, 9]]
    assert ids[1].tolist() == [7, 8, 9, 10, 11, 12], "what was given stays"


@pytest.mark.parametrize(("share", "rows"), [(0.0, []), (1 / 3, [2, 5]), (0.5, [1, 3, 5]), (1.0, [0, 1, 2, 3, 4, 5])])
def test_they_are_spread_evenly_over_each_batch(share: float, rows: list[int]) -> None:
    ids = np.arange(2 * 6 * 8).reshape(2, 6, 8)
    changed = (with_repetition(ids, share) != ids).any(axis=-1)
    assert [np.flatnonzero(batch).tolist() for batch in changed] == [rows, rows]


@given(st.integers(1, 30), st.integers(1, 20), st.floats(0, 1))
def test_the_first_token_stays_and_the_rest_comes_twice(sequences: int, length: int, share: float) -> None:
    ids = np.arange(sequences * length).reshape(sequences, length)
    result = with_repetition(ids, share)
    again = [row for row, changed in enumerate((result != ids).any(axis=1)) if changed]
    assert len(again) <= share * sequences + 1e-6
    half = length // 2
    for row in again:
        assert result[row, : 1 + half].tolist() == ids[row, : 1 + half].tolist()
        assert result[row, 1 + half :].tolist() == ids[row, 1 : length - half].tolist()
