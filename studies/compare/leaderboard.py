"""The comparison as a table: perplexity of every method, ratio and compensation, and how sure the order is."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nirvana.errors import InputError
from nirvana.files import atomic_file
from studies.bootstrap import paired_bootstrap
from studies.comparison import BEST, COMPENSATIONS, DENSE
from studies.titles import BUDGET_SLACK
from studies.tracking import Series

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Line:
    """One method at one ratio with one compensation; the mean over its seeds."""

    method: str
    compensation: str
    ratio: float
    achieved_ratio: float
    off_budget: bool
    parameters: int
    seeds: int
    kl_divergence: float
    """Nats a token of the held-out text."""
    token_perplexity: float
    """exp of the mean loss over all windows of the evaluation text."""
    loss_difference: float
    """Mean loss less the reference's at the same ratio, nats a token; above 0 is worse."""
    low: float
    high: float
    """95 % paired bootstrap interval of it, over windows."""
    saliency_seconds: float
    compensation_seconds: float
    evaluation_seconds: float


def leaderboard(rows: Rows, reference: tuple[str, str] = BEST) -> list[Line]:
    """Return one line a method, ratio and compensation: by ratio, then the least perplexity first.

    Args:
        rows: `studies.compare.study.measure`'s.
        reference: Method and compensation that the others are compared with, window by window. The dense model is
            compared with the best of the least ratio's.

    Raises:
        InputError: If the reference was not measured at some ratio.
    """
    groups: dict[tuple[float, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["ratio"], row["method"], row["compensation"]), []).append(row)
    ratios = sorted({ratio for ratio, method, _ in groups if method != DENSE})
    for ratio in ratios:
        if (ratio, *reference) not in groups:
            raise InputError(
                f"expected the reference {' + '.join(reference)} at ratio {ratio:g}, found none; add it to the methods"
            )
    lines = [
        _line(members, groups[(ratio if method != DENSE else ratios[0], *reference)])
        for (ratio, method, _), members in groups.items()
    ]
    return sorted(lines, key=lambda line: (line.ratio, line.token_perplexity))


def mean_losses(members: Rows) -> np.ndarray:
    """Return each window's loss, the mean over seeds."""
    return np.mean([row["losses"] for row in members], axis=0)


def _line(members: Rows, reference: Rows) -> Line:
    first, losses = members[0], mean_losses(members)

    def mean(name: str) -> float:
        return float(np.mean([row[name] for row in members]))

    interval = paired_bootstrap(losses, mean_losses(reference))
    return Line(
        method=first["method"],
        compensation=first["compensation"],
        ratio=first["ratio"],
        achieved_ratio=mean("achieved_ratio"),
        off_budget=any(abs(row["achieved_ratio"] - row["ratio"]) > BUDGET_SLACK for row in members),
        parameters=round(mean("parameters")),
        seeds=len(members),
        kl_divergence=mean("kl_divergence"),
        token_perplexity=math.exp(min(float(losses.mean()), 700.0)),
        loss_difference=interval.difference,
        low=interval.low,
        high=interval.high,
        saliency_seconds=mean("saliency_seconds"),
        compensation_seconds=mean("compensation_seconds"),
        evaluation_seconds=mean("evaluation_seconds"),
    )


def write_leaderboard(lines: Sequence[Line], path: Path) -> Path:
    """Write the lines as CSV, not rounded."""
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(Line.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(line) for line in lines)
    return path


def shown(lines: Sequence[Line], reference: tuple[str, str] = BEST) -> list[list[str]]:
    """Return the lines as text: a header, then one row each."""
    return [
        ["ratio", "method", "achieved", "KL", "perplexity", "loss above reference"],
        *(_shown(x, reference) for x in lines),
    ]


def _shown(line: Line, reference: tuple[str, str]) -> list[str]:
    names = (line.method, line.compensation)
    method = _called(names) + (f" ({line.seeds} seeds)" if line.seeds > 1 else "")
    perplexity = f"{line.token_perplexity:.2f}" if line.token_perplexity < 1e4 else f"{line.token_perplexity:.2e}"
    if line.method == DENSE:
        return ["", method, "", "", perplexity, ""]
    achieved = f"{line.achieved_ratio:.3f}{' *' if line.off_budget else ''}"
    difference = f"{line.loss_difference:+.2f} [{line.low:+.2f}, {line.high:+.2f}]"
    difference = "the reference" if names == reference else difference
    return [f"{line.ratio:g}", method, achieved, f"{line.kl_divergence:.3f}", perplexity, difference]


def verdict(lines: Sequence[Line], reference: tuple[str, str] = BEST) -> list[str]:
    """Say at each ratio how the reference stands among the other methods, each at its best: one sentence a ratio.

    What else the reference's own method was tried with stands in the table, and is no rival.
    """
    sentences = []
    for ratio in sorted({line.ratio for line in lines if line.method != DENSE}):
        at_ratio = sorted((line for line in lines if line.ratio == ratio), key=lambda line: -line.token_perplexity)
        others = list({line.method: line for line in at_ratio if line.method not in (DENSE, reference[0])}.values())
        ours = next(line for line in at_ratio if (line.method, line.compensation) == reference)
        ahead, behind = [each for each in others if each.low > 0], [each for each in others if each.high < 0]
        sentence = (
            f"Ratio {ratio:g}: {_called(reference)} has perplexity {ours.token_perplexity:.2f}, surely better (95 %) "
            f"than {len(ahead)} of {len(others)} other methods, each with what suits it best"
        )
        unsure = [each for each in others if each not in ahead and each not in behind]
        sentence += f", not surely apart from {_listed(unsure)}" if unsure else ""
        sentence += f", surely worse than {_listed(behind)}" if behind else ""
        sentences.append(f"{sentence}.")
    return sentences


_LISTED = 4  # names a sentence has room for


def _listed(lines: Sequence[Line]) -> str:
    names = [_called((line.method, line.compensation)) for line in lines[:_LISTED]]
    more = len(lines) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _called(names: tuple[str, str]) -> str:
    method, compensation = names
    return method if compensation == "none" else f"{method} + {compensation.replace('_', ' ')}"


def series(lines: Sequence[Line]) -> dict[str, list[Series]]:
    """Return perplexity and KL by ratio in percent as MLflow takes them, a child a method and compensation."""
    result: dict[str, list[Series]] = {}
    order: dict[str, int] = {compensation: number for number, compensation in enumerate(COMPENSATIONS)}
    for method, compensation in sorted({(x.method, x.compensation) for x in lines}, key=lambda x: (x[0], order[x[1]])):
        mine = [line for line in lines if (line.method, line.compensation) == (method, compensation)]
        result[_called((method, compensation))] = [
            Series(f"{metric}_by_ratio_percent", [(round(100 * line.ratio), getattr(line, metric)) for line in mine])
            for metric in ("token_perplexity", "kl_divergence", "achieved_ratio")
        ]
    return result
