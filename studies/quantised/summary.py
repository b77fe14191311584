"""What pruning and quantising cost, alone and together, as tables and sentences."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from nirvana.files import atomic_file
from studies.bootstrap import paired_bootstrap
from studies.comparison import DENSE
from studies.quantised.weights import STORED
from studies.tracking import Series

Rows = Sequence[Mapping[str, Any]]
TITLES = {"nirvana": "NIRVANA", "fisher": "Fisher"}
LEGEND = "Fisher: mask Fisher; LS: output projections solved for by least squares"
_AS_MANY = 1.01  # so much more is no more: rounding of kept units


@dataclass(frozen=True)
class Cell:
    """One model at one precision; what it loses against the dense model as stored, in nats a token."""

    method: str
    compensation: str
    ratio: float
    achieved_ratio: float
    precision: str
    parameters: int
    bytes: int
    kl_divergence: float
    """Nats a token of the held-out text."""
    token_perplexity: float
    loss_increase: float
    low: float
    high: float
    """95 % paired bootstrap interval of the increase, over windows."""
    on_front: bool
    """Whether no other cell of as few bytes (within a percent) or fewer has as little perplexity."""


@dataclass(frozen=True)
class Sum:
    """Two damages, each alone, added up and together: loss increases in nats a token."""

    method: str
    compensation: str
    ratio: float
    precision: str
    of_pruning: float
    of_quantising: float
    added: float
    together: float
    excess: float
    """`together` less `added`: above 0, each makes the other worse."""
    low: float
    high: float
    """95 % paired bootstrap interval of the excess, over windows."""


def cells(rows: Rows) -> list[Cell]:
    """Return a line a row, in their order."""
    dense = _losses(rows, (DENSE, 0.0, "none"), STORED)
    perplexities = [math.exp(min(float(np.mean(row["losses"])), 700.0)) for row in rows]
    sizes = [row["bytes"] for row in rows]
    lines = []
    for row, perplexity in zip(rows, perplexities, strict=True):
        interval = paired_bootstrap(row["losses"], dense)
        better = (
            (other < perplexity and size <= _AS_MANY * row["bytes"]) or (other == perplexity and size < row["bytes"])
            for size, other in zip(sizes, perplexities, strict=True)
        )
        kept = {each.name: row[each.name] for each in fields(Cell) if each.name in row}
        lines.append(
            Cell(
                **kept,
                token_perplexity=perplexity,
                loss_increase=interval.difference,
                low=interval.low,
                high=interval.high,
                on_front=not any(better),
            )
        )
    return lines


def sums(rows: Rows) -> list[Sum]:
    """Return, for each pruned model and precision, whether the damages add up."""
    nothing = (DENSE, 0.0, "none")
    dense = _losses(rows, nothing, STORED)
    found = []
    for row in rows:
        model = (row["method"], row["ratio"], row["compensation"])
        if model == nothing or row["precision"] == STORED:
            continue
        both, pruned = _losses(rows, model, row["precision"]), _losses(rows, model, STORED)
        quantised = _losses(rows, nothing, row["precision"])
        # window by window: (both − dense) − (pruned − dense) − (quantised − dense)
        interval = paired_bootstrap(both + dense, pruned + quantised)
        of_pruning, of_quantising = (float((each - dense).mean()) for each in (pruned, quantised))
        found.append(
            Sum(
                method=row["method"],
                compensation=row["compensation"],
                ratio=row["ratio"],
                precision=row["precision"],
                of_pruning=of_pruning,
                of_quantising=of_quantising,
                added=of_pruning + of_quantising,
                together=float((both - dense).mean()),
                excess=interval.difference,
                low=interval.low,
                high=interval.high,
            )
        )
    return found


def _losses(rows: Rows, model: tuple[str, float, str], precision: str) -> np.ndarray:
    row = next(
        row
        for row in rows
        if (row["method"], row["ratio"], row["compensation"]) == model and row["precision"] == precision
    )
    return np.asarray(row["losses"], dtype=np.float64)


def called(line: Cell | Sum) -> str:
    """Return what a model is called: `dense`, `NIRVANA 0.4`, `Fisher + LS 0.4` (see `LEGEND`)."""
    if line.method == DENSE:
        return DENSE
    name = TITLES.get(line.method, line.method.replace("_", " "))
    return f"{name}{'' if line.compensation == 'none' else ' + LS'} {line.ratio:g}"


def cell_table(lines: Sequence[Cell]) -> list[list[str]]:
    """Return the cells as text: a header, then one row each; `*` marks the front."""
    heading = ["model", "MB", "KL", "perplexity", "loss above dense"]
    return [heading, *(_cell_shown(line) for line in lines)]


def _cell_shown(line: Cell) -> list[str]:
    perplexity = f"{line.token_perplexity:.2f}" if line.token_perplexity < 1e4 else f"{line.token_perplexity:.2e}"
    increase = f"{line.loss_increase:+.3f} [{line.low:+.3f}, {line.high:+.3f}]"
    is_dense = line.method == DENSE and line.precision == STORED
    return [
        f"{called(line)} {line.precision}{' *' if line.on_front else ''}",
        f"{line.bytes / 1e6:.1f}",
        "" if is_dense else f"{line.kl_divergence:.3f}",
        perplexity,
        "" if is_dense else increase,
    ]


def sum_table(lines: Sequence[Sum]) -> list[list[str]]:
    """Return the sums as text: a header, then one row each."""
    heading = ["model", "pruned", "quantised", "sum", "both", "both − sum"]
    return [heading, *(_sum_shown(line) for line in lines)]


def _sum_shown(line: Sum) -> list[str]:
    values = (line.of_pruning, line.of_quantising, line.added, line.together)
    excess = f"{line.excess:+.3f} [{line.low:+.3f}, {line.high:+.3f}]"
    return [f"{called(line)} {line.precision}", *(f"{value:+.3f}" for value in values), excess]


def verdict(lines: Sequence[Cell], found: Sequence[Sum]) -> list[str]:
    """Say at each precision whether the damages add up, then which cells are worth their bytes."""
    sentences = []
    for precision in dict.fromkeys(line.precision for line in found):
        mine = [line for line in found if line.precision == precision]
        worse, milder = [line for line in mine if line.low > 0], [line for line in mine if line.high < 0]
        alone = mine[0].of_quantising
        sentence = (
            f"{precision} costs the dense model {alone:+.3f} nats a token; with pruning, the damage of both is "
            f"not surely apart (95 %) from their sum in {len(mine) - len(worse) - len(milder)} of {len(mine)} models"
        )
        sentence += f", surely more than their sum in {_listed(worse)}" if worse else ""
        sentence += f", surely less in {_listed(milder)}" if milder else ""
        sentences.append(f"{sentence}.")
    front = sorted((line for line in lines if line.on_front), key=lambda line: -line.bytes)
    names = ", ".join(f"{called(line)} {line.precision} ({line.bytes / 1e6:.0f} MB)" for line in front)
    sentences.append(f"No other has as little perplexity in as few bytes as: {names}.")
    return sentences


def _listed(lines: Sequence[Sum]) -> str:
    return ", ".join(f"{called(line)} ({line.excess:+.3f})" for line in lines)


def write_tables(lines: Sequence[Cell], found: Sequence[Sum], path: Path) -> list[Path]:
    """Write both tables as CSV, not rounded; the sums beside the cells."""
    beside = path.with_name(f"{path.stem}_sums.csv")
    return [_write(path, lines, Cell), _write(beside, found, Sum)]


def _write(path: Path, lines: Sequence[Any], kind: type) -> Path:
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, [each.name for each in fields(kind)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(line) for line in lines)
    return path


def series(lines: Sequence[Cell], found: Sequence[Sum]) -> dict[str, list[Series]]:
    """Return what MLflow keeps, a child a model and precision; steps are ratios in percent."""
    result: dict[str, list[Series]] = {}
    for line in lines:
        step = round(100 * line.ratio)
        metrics = ("token_perplexity", "kl_divergence", "loss_increase", "bytes")
        points = [Series(metric, [(step, float(getattr(line, metric)))]) for metric in metrics]
        result[f"{called(line)} {line.precision}"] = points
    for total in found:
        excess = Series("loss_beyond_the_sum", [(round(100 * total.ratio), total.excess)])
        result[f"{called(total)} {total.precision}"].append(excess)
    return result
