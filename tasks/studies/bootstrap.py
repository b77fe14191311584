"""Intervals for the difference between two models on the same items or windows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nirvana.errors import InputError

_INDICES_AT_ONCE = 1 << 20  # 8 MB
_TAILS = (2.5, 97.5)


class Interval(NamedTuple):
    """A mean difference and its 95 % interval."""

    difference: float
    low: float
    high: float


def paired_bootstrap(a: ArrayLike, b: ArrayLike, samples: int = 10_000, seed: int = 0) -> Interval:
    """Return the mean of a − b over items, and its 95 % percentile interval.

    Items are drawn with replacement, both models' values of an item together: what makes an item hard for both does
    not widen the interval. Items count as independent.

    Args:
        a: One model's value an item: right or wrong, or the loss of a window.
        b: The other's, on the same items in the same order.
        samples: Resampled sets of as many items.
        seed: Of the draw.

    Raises:
        InputError: If the two are not equally many finite values, or there are none.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    values = [np.asarray(each, dtype=np.float64) for each in (a, b)]
    _check(values)
    differences = values[0] - values[1]
    generator = np.random.default_rng(seed)
    chunk = max(1, _INDICES_AT_ONCE // len(differences))
    means = np.concatenate(
        [
            differences[
                generator.integers(len(differences), size=(min(chunk, samples - first), len(differences)))
            ].mean(1)
            for first in range(0, samples, chunk)
        ]
    )
    low, high = np.percentile(means, _TAILS)
    return Interval(float(differences.mean()), float(low), float(high))


def _check(values: Sequence[np.ndarray]) -> None:
    shapes = [each.shape for each in values]
    if shapes[0] != shapes[1] or len(shapes[0]) != 1 or not values[0].size:
        raise InputError(
            f"expected two rows of as many values, one an item, got shapes {shapes[0]} and {shapes[1]}; "
            "score both models on the same items"
        )
    if not all(np.isfinite(each).all() for each in values):
        raise InputError("expected finite values, got infinite or missing ones; leave out the items that have none")
