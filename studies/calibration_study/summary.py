"""What the calibration study found: whether KL chooses well, what averaging, more text and the right text are worth."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from studies.bootstrap import Interval, paired_bootstrap
from studies.comparison import DENSE

Rows = Sequence[Mapping[str, Any]]
Losses = NDArray[np.float64]
"""`[plans, windows]`"""
_TAILS = (2.5, 97.5)
_SAMPLES, _SEED = 10_000, 0
_COMPARED_AT_ONCE = 1 << 18  # two of 2 MB


@dataclass(frozen=True)
class Line:
    """One way to choose what is calibrated on, judged on the text it was drawn from."""

    part: str
    variant: str
    plans: int
    """So many were judged; what follows is their mean."""
    kl_divergence: float
    token_perplexity: float
    """exp of the mean loss over plans and windows."""
    deviation: float | None
    """Standard deviation of the mean loss between plans, in nats a token; None of one plan."""
    gain: float
    """Loss of the mean candidate less this one's, nats a token: above 0 is better than a batch taken blindly."""
    low: float
    high: float
    """95 % paired bootstrap interval of the gain, over windows: of these plans on other text alike."""


@dataclass(frozen=True)
class Match:
    """Calibrated on one text, judged on one: what it costs, and what it would cost less on the judge's own kind."""

    calibrated_on: str
    judged_on: str
    plans: int
    kl_divergence: float
    dense_perplexity: float
    token_perplexity: float
    loss_increase: float
    """Mean loss above the dense model's."""
    deviation: float | None
    disadvantage: float
    """Loss above that of plans calibrated on the judge's own kind of text; 0 where they are these."""
    low: float
    high: float
    """95 % bootstrap interval of the disadvantage, over batches of both and over windows."""


# --- rank correlation -------------------------------------------------------------------------------------------


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Return Spearman's rank correlation; ties share their mean rank; NaN where one side is constant."""
    return float(_correlated(np.stack([np.asarray(each, dtype=np.float64) for each in (x, y)])))


def _correlated(pairs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rank correlation of each set of pairs, `[2, ..., pairs]`."""
    # a rank, but for a constant: how many are less, and half of those that are equal
    ranks = np.sign(pairs[..., :, None] - pairs[..., None, :]).sum(axis=-1) / 2
    with np.errstate(invalid="ignore"):  # 0 / 0
        result: NDArray[np.float64] = (ranks[0] * ranks[1]).sum(-1) / np.sqrt((ranks**2).sum(-1).prod(0))
    return result


def spearman_interval(x: ArrayLike, y: ArrayLike, samples: int = _SAMPLES, seed: int = _SEED) -> Interval:
    """Return the correlation and its 95 % percentile interval, pairs drawn with replacement.

    Rough where there are few pairs: of 16 it says little more than whether there is a correlation at all.
    """
    pairs = np.stack([np.asarray(each, dtype=np.float64) for each in (x, y)])
    count = pairs.shape[1]
    chosen = np.random.default_rng(seed).integers(count, size=(samples, count))
    at_once = max(1, _COMPARED_AT_ONCE // count**2)
    found = [_correlated(pairs[:, chosen[first : first + at_once]]) for first in range(0, samples, at_once)]
    low, high = np.nanpercentile(np.concatenate(found), _TAILS)
    return Interval(spearman(x, y), float(low), float(high))


# --- selection, averaging, amount ---------------------------------------------------------------------------------


def chance_of_selection(scores: ArrayLike, pool_size: int) -> NDArray[np.float64]:
    """Return how likely each candidate is to be selected out of a pool of `pool_size` of them, all pools alike likely.

    The candidate of rank r (from 0, by score) wins where it is drawn and no better one is: C(n−1−r, m−1) / C(n, m).
    """
    values = np.asarray(scores, dtype=np.float64)
    count = len(values)
    chances = [math.comb(count - 1 - rank, pool_size - 1) / math.comb(count, pool_size) for rank in range(count)]
    result = np.empty(count)
    result[np.argsort(values, kind="stable")] = chances
    return result


def lines(rows: Rows, corpus: str, pool_size: int) -> list[Line]:
    """Return what each way to choose is worth on the corpus.

    Args:
        rows: `studies.calibration_study.study.measure`'s.
        corpus: What the corpus is called.
        pool_size: The pipeline's, of which the expected pick is told.
    """
    pool = matching(rows, part="candidate", calibrated_on=corpus, judged_on=corpus)
    blind, scores = losses_of(pool).mean(axis=0), np.array([row["kl_divergence"] for row in pool])
    order = np.argsort(scores, kind="stable")
    by_loss = np.argsort([np.mean(row["losses"]) for row in pool], kind="stable")
    found = [_line("candidate", "any one", pool, blind)]
    if pool_size < len(pool):
        chances = chance_of_selection(scores, pool_size)
        found.append(_expected(f"lowest KL of {pool_size}, expected", pool, chances, blind))
    found.append(_line("candidate", f"lowest KL of {len(pool)}", [pool[order[0]]], blind))
    found.append(_line("candidate", "best in hindsight", [pool[by_loss[0]]], blind))
    for part, called in (("best", "mean of the best {}"), ("any", "mean of any {}")):
        for count in sorted({row["averaged"] for row in matching(rows, part=part)}):
            found.append(_line(part, called.format(count), matching(rows, part=part, averaged=count), blind))
    for part in ("count", "length"):
        for shape in dict.fromkeys((row["sequences"], row["length"]) for row in matching(rows, part=part)):
            members = matching(rows, part=part, sequences=shape[0], length=shape[1])
            found.append(_line(part, f"{shape[0]} × {shape[1]} tokens", members, blind))
    return found


def _line(part: str, variant: str, members: Rows, blind: Losses) -> Line:
    losses, interval = losses_of(members), paired_bootstrap(blind, losses_of(members).mean(axis=0))
    return Line(
        part=part,
        variant=variant,
        plans=len(members),
        kl_divergence=float(np.mean([row["kl_divergence"] for row in members])),
        token_perplexity=perplexity(losses),
        deviation=_deviation(losses),
        gain=interval.difference,
        low=interval.low,
        high=interval.high,
    )


def _expected(variant: str, pool: Rows, chances: NDArray[np.float64], blind: Losses) -> Line:
    losses = losses_of(pool)
    expected, each = chances @ losses, losses.mean(axis=1)
    interval = paired_bootstrap(blind, expected)
    return Line(
        part="candidate",
        variant=variant,
        plans=len(pool),
        kl_divergence=float(chances @ np.array([row["kl_divergence"] for row in pool])),
        token_perplexity=perplexity(expected),
        deviation=math.sqrt(float(chances @ (each - chances @ each) ** 2)),
        gain=interval.difference,
        low=interval.low,
        high=interval.high,
    )


def matching(rows: Rows, **wanted: Any) -> list[Mapping[str, Any]]:
    """Return the rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def losses_of(rows: Rows) -> Losses:
    """Return each plan's loss on each window."""
    return np.array([row["losses"] for row in rows], dtype=np.float64)


def perplexity(losses: Losses) -> float:
    return math.exp(min(float(losses.mean()), 700.0))


def _deviation(losses: Losses) -> float | None:
    return float(losses.mean(axis=1).std(ddof=1)) if len(losses) > 1 else None


def correlations(rows: Rows, corpus: str) -> dict[str, Interval]:
    """Return how KL on the corpus ranks its candidates as perplexity does: on the corpus, and on what else judges."""
    pool = matching(rows, part="candidate", calibrated_on=corpus)
    scores = [row["kl_divergence"] for row in matching(pool, judged_on=corpus)]
    judges = dict.fromkeys(row["judged_on"] for row in pool)
    return {
        judge: spearman_interval(scores, losses_of(matching(pool, judged_on=judge)).mean(axis=1)) for judge in judges
    }


# --- domains ----------------------------------------------------------------------------------------------------


def matches(rows: Rows) -> list[Match]:
    """Return every pair of calibration text and judging text; none where there is one text only."""
    judges = list(dict.fromkeys(row["judged_on"] for row in matching(rows, part="candidate")))
    found = []
    for judge in judges if len(judges) > 1 else []:
        dense = losses_of(matching(rows, part=DENSE, judged_on=judge))
        own = losses_of(matching(rows, part="candidate", calibrated_on=judge, judged_on=judge))
        for source in judges:
            members = matching(rows, part="candidate", calibrated_on=source, judged_on=judge)
            if not members or not len(own):
                continue
            losses = losses_of(members)
            interval = Interval(0.0, 0.0, 0.0) if source == judge else two_way_bootstrap(losses, own)
            found.append(
                Match(
                    calibrated_on=source,
                    judged_on=judge,
                    plans=len(members),
                    kl_divergence=float(np.mean([row["kl_divergence"] for row in members])),
                    dense_perplexity=perplexity(dense),
                    token_perplexity=perplexity(losses),
                    loss_increase=float(losses.mean() - dense.mean()),
                    deviation=_deviation(losses),
                    disadvantage=interval.difference,
                    low=interval.low,
                    high=interval.high,
                )
            )
    return found


def two_way_bootstrap(a: Losses, b: Losses, samples: int = _SAMPLES, seed: int = _SEED) -> Interval:
    """Return the mean of a less that of b and its 95 % percentile interval, plans and windows drawn with replacement.

    Args:
        a: Losses `[plans, windows]`.
        b: Of other plans, as many or not, on the same windows.
        samples: Resampled sets: plans of each by themselves, windows for both together.
        seed: Of the draw.
    """
    generator = np.random.default_rng(seed)

    def drawn(count: int) -> NDArray[np.float64]:
        return generator.multinomial(count, np.full(count, 1 / count), size=samples) / count

    windows = drawn(a.shape[1])
    means = [((drawn(len(each)) @ each) * windows).sum(axis=1) for each in (a, b)]
    low, high = np.percentile(means[0] - means[1], _TAILS)
    return Interval(float(a.mean() - b.mean()), float(low), float(high))
