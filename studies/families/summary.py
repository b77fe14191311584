"""What the families' models lost, as lines, a table and sentences."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana.errors import InputError
from nirvana.files import atomic_file
from studies.bootstrap import Interval, paired_bootstrap
from studies.comparison import BEST, DENSE
from studies.families.study import REFUSED, Rows
from studies.titles import BUDGET_SLACK
from studies.tracking import Series

NIRVANA = ("nirvana", "none")
_SAMPLES, _TAILS = 10_000, (2.5, 97.5)


@dataclass(frozen=True)
class Line:
    """One method with one compensation at one ratio in one family; the mean over its models."""

    ratio: float
    family: str
    method: str
    compensation: str
    models: int
    achieved_ratio: float
    kl_divergence: float
    """Nats a token of the held-out text."""
    loss: float
    """Of the evaluation text, nats a token."""
    above_dense: float
    """The same, less the dense model's."""
    above_best: float
    """The same, less the reference's: above 0 is worse."""
    low: float
    high: float
    """95 % bootstrap interval of it: over windows, and over models where there are some."""

    @property
    def way(self) -> tuple[str, str]:
        """Method and compensation."""
        return self.method, self.compensation


def lines_of(rows: Rows) -> list[Line]:
    """Return a line for every cell that could be measured on all models of its family, in the order of the rows.

    Raises:
        InputError: If the reference could not be measured somewhere.
    """
    groups: dict[tuple[float, str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["ratio"], row["family"], row["method"], row["compensation"]), []).append(row)
    lines = []
    for (ratio, family, method, compensation), members in groups.items():
        if any(REFUSED in row for row in members):
            if (method, compensation) == BEST:
                raise InputError(f"{family} at ratio {ratio:g}: {members[0][REFUSED]}")
            continue
        dense = _losses(groups[0.0, family, DENSE, "none"])
        best = dense if method == DENSE else _losses(groups[ratio, family, *BEST])
        losses = _losses(members)
        lines.append(
            Line(
                *(ratio, family, method, compensation, len(members)),
                _mean(members, "achieved_ratio"),
                _mean(members, "kl_divergence"),
                float(losses.mean()),
                float((losses - dense).mean()),
                *bootstrap(losses, best),
            )
        )
    return lines


def _mean(members: Rows, name: str) -> float:
    return float(np.mean([row[name] for row in members]))


def _losses(members: Rows) -> NDArray[np.float64]:
    """Return losses by model and window."""
    return np.array([row["losses"] for row in sorted(members, key=lambda row: row["seed"])], dtype=np.float64)


def bootstrap(a: NDArray[np.float64], b: NDArray[np.float64]) -> Interval:
    """Return the mean of a − b over models and windows, and its 95 % percentile interval.

    Models and windows are each drawn with replacement, a window for all models at once. Of a few models that draw
    knows little: the interval is then too narrow rather than too wide.

    Args:
        a: Losses `[models, windows]`.
        b: Of the same models on the same windows.
    """
    if len(a) == 1:
        return paired_bootstrap(a[0], b[0])
    differences, generator = a - b, np.random.default_rng(0)
    models, windows = (
        generator.multinomial(count, np.full(count, 1 / count), size=_SAMPLES) / count for count in differences.shape
    )
    low, high = np.percentile(((models @ differences) * windows).sum(axis=1), _TAILS)
    return Interval(float(differences.mean()), float(low), float(high))


def called(way: tuple[str, str]) -> str:
    """Return how a method and its compensation are written."""
    method, compensation = way
    return method if compensation == "none" else f"{method} + {compensation.replace('_', ' ')}"


def ratios_of(lines: Sequence[Line]) -> list[float]:
    """Return the pruning ratios, ascending."""
    return sorted({line.ratio for line in lines if line.method != DENSE})


def ways_by_loss(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """Return methods and compensations, the least loss over all families first."""
    ways = dict.fromkeys(line.way for line in lines if line.method != DENSE)
    return sorted(ways, key=lambda way: float(np.mean([line.above_best for line in lines if line.way == way])))


def table(lines: Sequence[Line], ratio: float) -> list[list[str]]:
    """Return the loss above the dense model as text: a row a method, a column a family, marked as `MARKS` says."""
    mine = {(line.way, line.family): line for line in lines if line.ratio == ratio}
    families = list(dict.fromkeys(line.family for line in lines))
    ways = ways_by_loss([*mine.values()])
    return [
        ["", *families],
        *([called(way), *(_cell(mine.get((way, family))) for family in families)] for way in ways),
    ]


MARKS = f"* {called(BEST)} is surely better (95 %), † surely worse; no mark: not surely apart"


def _cell(line: Line | None) -> str:
    if line is None:
        return "refused"
    mark = "* " if line.low > 0 else "† " if line.high < 0 else ""
    return f"{mark}{line.above_dense:+.3f}"


def verdict(lines: Sequence[Line]) -> list[str]:
    """Say at each ratio in how many families the reference is ahead and, in the same order, how alike they rank."""
    ratios = ratios_of(lines)
    several = len({line.family for line in lines}) > 1
    return [_standing(lines, ratio) for ratio in ratios] + [_agreement(lines, ratio) for ratio in ratios if several]


def _standing(lines: Sequence[Line], ratio: float) -> str:
    rivals = [line for line in lines if line.ratio == ratio and line.method != BEST[0]]
    families = list(dict.fromkeys(line.family for line in lines))
    behind = {family: [r for r in rivals if r.family == family and r.low <= 0] for family in families}
    published = [line for line in rivals if line.way == NIRVANA]
    against = f"nirvana in {sum(line.low > 0 for line in published)} of {len(published)} families, and than "
    sentence = (
        f"Ratio {ratio:g}: {called(BEST)} is surely better (95 %) than {against if published else ''}"
        f"every rival in {sum(not found for found in behind.values())} of {len(families)} families"
    )
    exceptions = [f"{family} ({_named(found)})" for family, found in behind.items() if found]
    return f"{sentence}{'; not in ' + ', '.join(exceptions) if exceptions else ''}."


_LISTED = 3  # names a sentence has room for


def _named(rivals: Sequence[Line]) -> str:
    kinds = {
        "surely worse than": [line for line in rivals if line.high < 0],
        "not surely apart from": [line for line in rivals if line.high >= 0],
    }
    return ", ".join(f"{how} {_listed(found)}" for how, found in kinds.items() if found)


def _listed(lines: Sequence[Line]) -> str:
    names = ", ".join(called(line.way) for line in lines[:_LISTED])
    return names + (f" and {len(lines) - _LISTED} more" if len(lines) > _LISTED else "")


def _agreement(lines: Sequence[Line], ratio: float) -> str:
    mine = [line for line in lines if line.ratio == ratio]
    by_family = {f: {line.way: line.loss for line in mine if line.family == f} for f in (line.family for line in mine)}
    shared = [way for way in ways_by_loss(mine) if all(way in losses for losses in by_family.values())]
    if len(shared) < 2:
        return f"Ratio {ratio:g}: one row has no order to compare."
    ranks = {f: np.argsort(np.argsort([losses[way] for way in shared])) for f, losses in by_family.items()}
    alike = {pair: float(np.corrcoef([ranks[f] for f in pair])[0, 1]) for pair in combinations(ranks, 2)}
    least = min(alike, key=alike.__getitem__)
    return (
        f"Ratio {ratio:g}: rank correlation of two families' orders of {len(shared)} rows is "
        f"{np.mean(list(alike.values())):.2f} on average, {alike[least]:.2f} at least ({' and '.join(least)})."
    )


def notes(rows: Rows, lines: Sequence[Line], unigram: float) -> list[str]:
    """Say what the models learnt, and what could not be measured as asked for."""
    dense = ", ".join(f"{line.family} {line.loss:.3f}" for line in lines if line.method == DENSE)
    said = [MARKS, f"dense loss, nats a token: {dense}; token frequencies alone: {unigram:.3f}"]
    off = [line for line in lines if abs(line.achieved_ratio - line.ratio) > BUDGET_SLACK]
    if off:
        found = ", ".join(f"{called(x.way)} in {x.family} ({x.achieved_ratio:.3f} of {x.ratio:g})" for x in off)
        said.append(f"more than 0.5 point off the budget: {found}")
    refused = dict.fromkeys(
        (row["family"], row["method"], row["compensation"], row[REFUSED]) for row in rows if REFUSED in row
    )
    return said + [f"left out: {called((method, how))} in {family}: {why}" for family, method, how, why in refused]


def write_lines(lines: Sequence[Line], path: Path) -> Path:
    """Write the lines as CSV, not rounded."""
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(Line.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(line) for line in lines)
    return path


def series(lines: Sequence[Line]) -> dict[str, list[Series]]:
    """Return losses above the dense model by ratio in percent as MLflow takes them: a metric a family."""
    return {called(way): [*_series([line for line in lines if line.way == way])] for way in ways_by_loss(lines)}


def _series(lines: Sequence[Line]) -> Iterator[Series]:
    for family in dict.fromkeys(line.family for line in lines):
        points = [(round(100 * line.ratio), line.above_dense) for line in lines if line.family == family]
        yield Series(f"loss_above_dense_{family}_by_ratio_percent", points)
