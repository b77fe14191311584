"""Paired intervals: cases worked by hand, the normal approximation as reference, what pairing is for."""

import itertools

import numpy as np
import pytest

from nirvana.errors import InputError
from studies.bootstrap import paired_bootstrap, two_way_bootstrap, unpaired_bootstrap


def test_a_constant_difference_has_no_width():
    assert paired_bootstrap([3.0, 5.0, 9.0], [2.0, 4.0, 8.0], samples=50) == (1.0, 1.0, 1.0)


def test_two_items_by_hand():
    """Means of two draws from differences 0 and 1: 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4."""
    assert paired_bootstrap([1, 1], [1, 0]) == (0.5, 0.0, 1.0)


def test_every_resample_of_four_items():
    """All 256 resamples, counted out, have the percentiles that 10,000 draws find."""
    differences = np.array([0.0, 1.0, 3.0, 8.0])
    means = [np.mean(draw) for draw in itertools.product(differences, repeat=4)]
    result = paired_bootstrap(differences, np.zeros(4))
    assert result.difference == 3.0
    assert result[1:] == pytest.approx(np.percentile(means, [2.5, 97.5], method="inverted_cdf"), abs=0.26)


def test_many_items_as_the_normal_approximation():
    """1,000 answers, more than one chunk of draws: difference ± 1.96 standard errors."""
    generator = np.random.default_rng(1)
    a, b = generator.random(1000) < 0.6, generator.random(1000) < 0.5
    difference, low, high = paired_bootstrap(a, b)
    error = np.std(a.astype(float) - b, ddof=1) / 1000**0.5
    assert difference == pytest.approx(np.mean(a) - np.mean(b))
    assert (low, high) == pytest.approx((difference - 1.96 * error, difference + 1.96 * error), abs=0.05 * error)


def test_what_makes_an_item_hard_for_both_does_not_widen_it():
    generator = np.random.default_rng(2)
    hardness = generator.normal(0, 100, 200)
    a, b = hardness + generator.normal(1, 0.1, 200), hardness
    _, low, high = paired_bootstrap(a, b)
    assert 0.9 < low < 1 < high < 1.1


def test_groups_are_drawn_whole():
    """Groups of 1 and 3 items, differences 0 and 1: means 0, 3/4, 1 with probabilities 1/4, 1/2, 1/4."""
    assert paired_bootstrap([1, 1, 1, 1], [1, 0, 0, 0], groups=["a", "b", "b", "b"]) == (0.75, 0.0, 1.0)


def test_groups_of_one_are_items():
    a, b = np.random.default_rng(4).normal(size=(2, 300))
    assert paired_bootstrap(a, b, groups=list(map(str, range(300)))) == pytest.approx(paired_bootstrap(a, b), abs=0.01)


def test_items_that_agree_within_a_group_count_as_few():
    values, groups = np.random.default_rng(5).normal(size=40).repeat(25), [str(n // 25) for n in range(1000)]
    _, low, high = paired_bootstrap(values, np.zeros(1000))
    _, low_of_groups, high_of_groups = paired_bootstrap(values, np.zeros(1000), groups=groups)
    assert (high_of_groups - low_of_groups) / (high - low) == pytest.approx(5, rel=0.1)


def test_a_missing_group_is_named():
    with pytest.raises(InputError, match="got 1 for 2"):
        paired_bootstrap([1, 2], [0, 0], groups=["a"])


def test_of_each_stratum_as_many_groups_are_drawn_as_it_has():
    """What differs between strata only has no width; a stratum of one group has none of its own."""
    values, nothing = [1, 1, 0, 0], [0, 0, 0, 0]
    assert paired_bootstrap(values, nothing, groups="abcd", strata="xxyy") == (0.5, 0.5, 0.5)
    assert paired_bootstrap(values, nothing, groups="abcd").low < 0.5
    # groups of the same name in two strata are two; of (3, 0) and (1, 1) only the first stratum's draw varies
    found = paired_bootstrap([3, 0, 1, 1], nothing, groups="abab", strata="xxyy")
    assert found == (1.25, 0.5, 2.0)


def test_a_missing_stratum_is_named():
    with pytest.raises(InputError, match="a stratum an item, got 1 for 2"):
        paired_bootstrap([1, 2], [0, 0], groups=["a", "b"], strata=["x"])


def test_the_draw_is_the_seeds():
    a, b = np.random.default_rng(3).normal(size=(2, 40))
    assert paired_bootstrap(a, b) == paired_bootstrap(a, b)
    assert paired_bootstrap(a, b, seed=1) != paired_bootstrap(a, b)
    flipped = paired_bootstrap(b, a)
    assert flipped == pytest.approx([-value for value in (lambda r: (r[0], r[2], r[1]))(paired_bootstrap(a, b))])


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [([], [], "got shapes"), ([1.0, 2.0], [1.0], r"got shapes \(2,\) and \(1,\)"), ([np.nan], [1.0], "finite")],
)
def test_what_cannot_be_compared(a, b, said):
    with pytest.raises(InputError, match=said):
        paired_bootstrap(a, b)


def test_models_that_agree_leave_the_windows_only():
    assert two_way_bootstrap(np.array([[1.0, 3.0]] * 3)) == (2, 1, 3)


def test_unpaired_bootstrap():
    a, b = np.full((3, 5), 2.0), np.full((2, 5), 1.5)
    assert unpaired_bootstrap(a, b, samples=50) == tuple(pytest.approx(0.5) for _ in range(3))
    hard = np.arange(5.0)  # hard windows are hard for both: no uncertainty
    assert unpaired_bootstrap(a + hard, b + hard, samples=50) == tuple(pytest.approx(0.5) for _ in range(3))
    a[0] += 3  # one plan of three is worse: 0 to 3 of 3 draws are that one
    spread = unpaired_bootstrap(a, b, samples=2000)
    assert spread == (pytest.approx(1.5), pytest.approx(0.5), pytest.approx(3.5, abs=1.01))
