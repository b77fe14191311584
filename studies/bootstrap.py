"""Intervals for the difference between two models on the same items or windows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nirvana.errors import InputError

_INDICES_AT_ONCE = 1 << 20  # 8 MB
_TAILS = (2.5, 97.5)


class Interval(NamedTuple):
    """A mean difference and its 95 % interval."""

    difference: float
    low: float
    high: float


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    samples: int = 10_000,
    seed: int = 0,
    groups: Sequence[str] | None = None,
    strata: Sequence[str] | None = None,
) -> Interval:
    """Return the mean of a − b over items, and its 95 % percentile interval.

    Items are drawn with replacement, both models' values of an item together: what makes an item hard for both does
    not widen the interval. Items count as independent unless they are in groups, which are drawn whole.

    Args:
        a: One model's value an item: right or wrong, or the loss of a window.
        b: The other's, on the same items in the same order.
        samples: Resampled sets of as many items, or groups.
        seed: Of the draw.
        groups: What each item belongs to, for example its document; None: each to itself.
        strata: As in `resampled_sums`; of groups only.

    Raises:
        InputError: If the two are not equally many finite values, there are none, or a group is missing.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13; of groups, Davison and Hinkley
    1997, "Bootstrap Methods and their Application", section 3.8.
    """
    values = [np.asarray(each, dtype=np.float64) for each in (a, b)]
    _check(values)
    differences = values[0] - values[1]
    if groups is not None:
        sums = resampled_sums(differences[:, None], groups, samples, seed, strata)
        low, high = np.percentile(sums[:, 0] / sums[:, 1], _TAILS)
        return Interval(float(differences.mean()), float(low), float(high))
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


def two_way_bootstrap(differences: ArrayLike, samples: int = 10_000, seed: int = 0) -> Interval:
    """Return the mean over models and windows, and its 95 % percentile interval.

    Models and windows are each drawn with replacement, a window for all models at once. Of a few models that draw
    knows little: the interval is then too narrow rather than too wide.

    Args:
        differences: Of each model to another on each window, `[models, windows]`.
        samples: Resampled sets.
        seed: Of the draw.
    """
    values, generator = np.asarray(differences, dtype=np.float64), np.random.default_rng(seed)
    models, windows = (_shares(generator, count, samples) for count in values.shape)
    low, high = np.percentile(((models @ values) * windows).sum(axis=1), _TAILS)
    return Interval(float(values.mean()), float(low), float(high))


def unpaired_bootstrap(a: ArrayLike, b: ArrayLike, samples: int = 10_000, seed: int = 0) -> Interval:
    """Return the mean of a less that of b and its 95 % percentile interval, plans and windows drawn with replacement.

    Args:
        a: Losses `[plans, windows]`.
        b: Of other plans, as many or not, on the same windows.
        samples: Resampled sets: plans of each by themselves, windows for both together.
        seed: Of the draw.
    """
    first, second = (np.asarray(each, dtype=np.float64) for each in (a, b))
    generator = np.random.default_rng(seed)
    windows = _shares(generator, first.shape[1], samples)
    means = [((_shares(generator, len(each), samples) @ each) * windows).sum(axis=1) for each in (first, second)]
    low, high = np.percentile(means[0] - means[1], _TAILS)
    return Interval(float(first.mean() - second.mean()), float(low), float(high))


def _shares(generator: np.random.Generator, count: int, samples: int) -> NDArray[np.float64]:
    """Return how large a share of each draw each of `count` is: `[samples, count]`."""
    return generator.multinomial(count, np.full(count, 1 / count), size=samples) / count


def resampled_sums(
    values: NDArray[np.float64],
    groups: Sequence[str],
    samples: int,
    seed: int,
    strata: Sequence[str] | None = None,
) -> NDArray[np.float64]:
    """Draw whole groups with replacement, as many as there are, and return what each draw adds up to.

    Args:
        values: `[items, columns]`.
        groups: What each item belongs to.
        samples: Draws.
        seed: Of the draws.
        strata: What each item's group was chosen from, for example its text: from each, as many groups are drawn as
            it has. None: from all alike. Groups of different strata are different.

    Returns:
        `[samples, columns + 1]`: the sum of each column, and the number of items.

    Raises:
        InputError: If there are not as many groups, or strata, as items.
    """
    if len(groups) != len(values):
        raise InputError(f"expected a group an item, got {len(groups)} for {len(values)}; name the group of each")
    if strata is not None and len(strata) != len(values):
        raise InputError(f"expected a stratum an item, got {len(strata)} for {len(values)}; name the stratum of each")
    counted = np.concatenate([values, np.ones((len(values), 1))], axis=1)
    generator, of_item = np.random.default_rng(seed), np.asarray(list(groups))
    within = (
        np.zeros(len(values), dtype=np.int64) if strata is None else np.unique(list(strata), return_inverse=True)[1]
    )
    total = np.zeros((samples, counted.shape[1]))
    for stratum in range(int(within.max()) + 1):
        mine = within == stratum
        _, member = np.unique(of_item[mine], return_inverse=True)
        sums = np.zeros((int(member.max()) + 1, counted.shape[1]))
        np.add.at(sums, member, counted[mine])
        # few sums differ: how often each is drawn is multinomial, which is to draw groups
        different, counts = np.unique(sums, axis=0, return_counts=True)
        total += generator.multinomial(len(sums), counts / len(sums), size=samples) @ different
    return total


def _check(values: Sequence[np.ndarray]) -> None:
    shapes = [each.shape for each in values]
    if shapes[0] != shapes[1] or len(shapes[0]) != 1 or not values[0].size:
        raise InputError(
            f"expected two rows of as many values, one an item, got shapes {shapes[0]} and {shapes[1]}; "
            "score both models on the same items"
        )
    if not all(np.isfinite(each).all() for each in values):
        raise InputError("expected finite values, got infinite or missing ones; leave out the items that have none")
