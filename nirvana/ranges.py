"""Sorted indices as text that a person can read and `diff` can compare: `0-2,5`."""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nirvana.errors import InputError
from nirvana.fields import shortened

_RANGES = re.compile(r"\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*\Z", re.ASCII)
_LONGEST_INDEX = 10  # characters with its separator


def to_ranges(indices: Sequence[int] | NDArray[np.int64]) -> str:
    """Write sorted indices as ranges: `[0, 1, 2, 5]` becomes `"0-2,5"`."""
    values = np.asarray(indices, dtype=np.int64)
    breaks = np.flatnonzero(np.diff(values) != 1)
    first, last = values[np.append(0, breaks + 1)[: len(values)]], values[np.append(breaks, -1)[: len(values)]]
    runs = zip(first.tolist(), last.tolist(), strict=True)
    return ",".join(str(start) if start == end else f"{start}-{end}" for start, end in runs)


def from_ranges(text: object, units: int) -> NDArray[np.int64]:
    """Read ranges back.

    Args:
        text: Ascending ranges such as `0-2,5`.
        units: Indices must be below this.

    Raises:
        InputError: If the text is no list of ranges, is empty, not strictly ascending or out of bounds.
    """
    if not isinstance(text, str) or len(text) > units * _LONGEST_INDEX or not _RANGES.match(text):
        raise InputError(f"keep: expected ranges such as '0-2,5', got {shortened(text)}; make the plan again")
    parts = [part.partition("-") for part in text.split(",")]
    first = np.array([int(low) for low, _, _ in parts], dtype=np.int64)
    last = np.array([int(high or low) for low, _, high in parts], dtype=np.int64)
    previous = np.concatenate([[-1], last[:-1]])
    wrong = np.flatnonzero((first <= previous) | (last < first) | (last >= units))
    if len(wrong):
        at = wrong[0]
        raise InputError(
            f"keep: expected ascending indices below {units}, got {first[at]}-{last[at]} after {previous[at]}; "
            "the plan belongs to another model or was edited"
        )
    steps = np.zeros(units + 1, dtype=np.int8)  # +1 where a range begins, -1 behind its end
    np.add.at(steps, first, 1)
    np.add.at(steps, last + 1, -1)
    return np.flatnonzero(np.cumsum(steps[:units], dtype=np.int8)).astype(np.int64)
