"""How often should a KV group count? Mask Fisher's one list at several factors, compensated by least squares.

A sum of second-order costs says too little of many units that leave one layer together, and of a group too little or
too much: which, depends on the model (docs/results.md). Held-out KL after compensation may tell; perplexity on other
text says what that is worth. Factors that keep the same units are judged once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from nirvana.allocation import Keep
from studies.comparison import DENSE, Comparison, Compensation
from studies.methods import METHODS
from studies.sweep.cells import (
    SHOWN,
    UNREACHABLE,
    Cell,
    Row,
    cell,
    reference_of,
    series,
    shown,
    unless_unreachable,
    verdict_of,
)
from studies.tracking import Series

STUDY = "attention_factor"
SWEPT = "fisher"
COMPENSATION: Compensation = "least_squares"
DEFAULT = METHODS[SWEPT].attention_factor
NAMES = ("ratio", "factor")


@dataclass(frozen=True)
class Settings:
    """What is swept; the default factor always takes part."""

    factors: tuple[float, ...] = (0.5, 1.0, DEFAULT, 4.0)
    ratios: tuple[float, ...] = (0.4,)

    @property
    def grid(self) -> tuple[float, ...]:
        """All factors, ascending."""
        return tuple(sorted({*self.factors, DEFAULT}))


def measure(comparison: Comparison, settings: Settings) -> list[dict[str, Any]]:
    """Return the dense model's row, and one a ratio and factor, with `kept` KV groups of `groups`."""
    wanted = [(ratio, factor) for ratio in settings.ratios for factor in settings.grid]
    rows: list[dict[str, Any]] = [comparison.dense() | {"factor": None}]
    with tqdm(wanted, desc="sweeping the factor", unit="row") as bar:
        for ratio, factor in bar:
            bar.set_postfix_str(f"{ratio:g} {factor:g}")
            names = {"ratio": ratio, "factor": factor}
            compute = partial(_row, comparison, ratio, factor, settings.grid)
            rows.append(unless_unreachable(names, compute))
    return rows


def _row(comparison: Comparison, ratio: float, factor: float, grid: Sequence[float]) -> Row:
    keep = _keep(comparison, ratio, factor)
    # the default first, for other studies judge that one
    alike = (each for each in (DEFAULT, *grid) if each == factor or _same(_keep(comparison, ratio, each), keep))
    method = replace(METHODS[SWEPT], attention_factor=next(alike))
    attention = [site for site in comparison.stack.architecture.sites() if site.module == "attention"]
    counted = {"kept": sum(len(keep[site.name]) for site in attention), "groups": sum(site.units for site in attention)}
    return comparison.row(method, ratio, COMPENSATION) | counted


def _keep(comparison: Comparison, ratio: float, factor: float) -> Keep:
    return comparison.keep(replace(METHODS[SWEPT], attention_factor=factor), ratio)[0]


def _same(first: Keep, second: Keep) -> bool:
    return all(np.array_equal(first[name], second[name]) for name in first)


# --- what came out --------------------------------------------------------------------------------------------


def cells_of(rows: Sequence[Row]) -> list[Cell]:
    """Return a cell a row but the dense one's, held against the default factor at its ratio."""
    return [
        cell(
            row,
            NAMES,
            reference_of(rows, ratio=row["ratio"], factor=DEFAULT),
            {} if UNREACHABLE in row else {"kept": row["kept"], "groups": row["groups"]},
        )
        for row in rows
        if row.get("method") != DENSE
    ]


def ratios_of(cells: Sequence[Cell]) -> list[float]:
    """Return the ratios that occur, ascending."""
    return sorted({each.names["ratio"] for each in cells})


def judged_at(cells: Sequence[Cell], ratio: float) -> list[Cell]:
    """Return the cells that could be reached, in the order of their factors."""
    found = [each for each in cells if each.names["ratio"] == ratio and each.judged]
    return sorted(found, key=lambda each: each.names["factor"])


def chosen(cells: Sequence[Cell], ratio: float) -> Cell | None:
    """Return the factor of the least held-out KL at a ratio; of equals the default, then the least."""
    found = judged_at(cells, ratio)
    return min(found, key=lambda each: (each.found.kl_divergence, each.names["factor"] != DEFAULT), default=None)


def verdict(cells: Sequence[Cell]) -> list[str]:
    """Say at each ratio which factor held-out KL chooses, and what that is worth."""
    sentences = []
    for ratio in ratios_of(cells):
        best = chosen(cells, ratio)
        if best is None:
            reason = next(each.unreachable for each in cells if each.names["ratio"] == ratio)
            sentences.append(f"Ratio {ratio:g}: no factor reaches it: {reason}.")
            continue
        factor, found = best.names["factor"], best.found
        sentence = f"Ratio {ratio:g}: held-out KL chooses attention_factor {factor:g} (KL {found.kl_divergence:.3f}, "
        sentence += f"perplexity {found.token_perplexity:.2f}, {best.more['kept']} of {best.more['groups']} KV groups)"
        if factor == DEFAULT:
            sentence += ", the default"
        else:
            sentence += f"; against the default {DEFAULT:g} its loss is {verdict_of(found)}"
        sentences.append(f"{sentence}.")
    return sentences


def tables(cells: Sequence[Cell]) -> dict[str, list[list[str]]]:
    """Return the cells as text, by title: a table a ratio, a header, then one row each."""
    result = {}
    for ratio in ratios_of(cells):
        title = f"Ratio {ratio:g}; differences to factor {DEFAULT:g} with 95 % intervals"
        rows = result[title] = [["factor", "KV groups", *SHOWN]]
        for each in (each for each in cells if each.names["ratio"] == ratio):
            kept = f"{each.more['kept']} of {each.more['groups']}" if each.judged else ""
            factor = each.names["factor"]
            rows.append([f"{factor:g}", kept, *shown(each.judged, factor == DEFAULT)])
    return result


def notes(cells: Sequence[Cell]) -> list[str]:
    """Return what the tables need to be read."""
    return [
        "mean KL hardly sees words that stand earlier in the text: see docs/decisions/0018-attention-counts-twice.md"
    ]


def children(cells: Sequence[Cell]) -> dict[str, list[Series]]:
    """Return what MLflow takes: a child a ratio, by factor in percent."""
    return {
        f"ratio {ratio:g}": series(
            judged_at(cells, ratio), "factor_percent", lambda each: round(100 * each.names["factor"]), ("kept",)
        )
        for ratio in ratios_of(cells)
    }
