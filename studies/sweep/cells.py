"""What sweeps share: variants of one method, each judged beside the reference of its ratio.

Intervals are paired: over windows of the evaluation text for perplexity, over sequences of the held-out text for KL.
"""

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nirvana.errors import InputError
from nirvana.files import atomic_file
from studies.bootstrap import paired_bootstrap
from studies.tracking import Series

Row = Mapping[str, Any]
UNREACHABLE = "unreachable"
"""Key of a row that has nothing but names: why the ratio cannot be reached."""


@dataclass(frozen=True)
class Judged:
    """A pruned model, and by how much it is worse than the reference (above 0), with 95 % intervals."""

    achieved_ratio: float
    kl_divergence: float
    """Nats a token of the held-out text."""
    kl_difference: float
    kl_low: float
    kl_high: float
    token_perplexity: float
    loss_difference: float
    """Mean loss on the evaluation text less the reference's, nats a token."""
    loss_low: float
    loss_high: float

    def kl_interval(self) -> tuple[float, float]:
        """Return the interval of the KL, the reference's being as measured."""
        reference = self.kl_divergence - self.kl_difference
        return reference + self.kl_low, reference + self.kl_high

    def perplexity_interval(self) -> tuple[float, float]:
        """Return the interval of the perplexity, the reference's being as measured."""
        reference = self.token_perplexity * math.exp(-self.loss_difference)
        return reference * math.exp(self.loss_low), reference * math.exp(self.loss_high)


@dataclass(frozen=True)
class Cell:
    """One variant at one ratio."""

    names: Mapping[str, Any]
    """What tells it from the others, `ratio` among them."""
    judged: Judged | None
    unreachable: str = ""
    """Why there is nothing to judge."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What this study alone measures."""

    @property
    def found(self) -> Judged:
        """What was found, where there is something."""
        assert self.judged is not None
        return self.judged


def perplexity(row: Row) -> float:
    """Return exp of the mean loss over all windows of the evaluation text."""
    losses = row["losses"]
    return math.exp(min(sum(losses) / len(losses), 700.0))


def judged(row: Row, reference: Row) -> Judged:
    """Hold a row of `studies.comparison` against another."""
    divergence = paired_bootstrap(row["divergences"], reference["divergences"])
    loss = paired_bootstrap(row["losses"], reference["losses"])
    return Judged(row["achieved_ratio"], row["kl_divergence"], *divergence, perplexity(row), *loss)


def cell(row: Row, names: Sequence[str], reference: Row | None, more: Mapping[str, Any] | None = None) -> Cell:
    """Return the cell of a row, held against a reference; None: there is none, so that the row is its own."""
    named = {name: row[name] for name in names}
    if UNREACHABLE in row:
        return Cell(named, None, row[UNREACHABLE])
    return Cell(named, judged(row, reference or row), more=more or {})


def unless_unreachable(names: Mapping[str, Any], compute: Callable[[], Row]) -> dict[str, Any]:
    """Return a row under the study's names; one with `UNREACHABLE` where the ratio cannot be reached."""
    try:
        return dict(compute()) | dict(names)
    except InputError as error:
        if "cannot be reached" not in str(error):  # nirvana.allocation's words; whatever else is wrong must be seen
            raise
        return dict(names) | {UNREACHABLE: str(error)}


def reference_of(rows: Iterable[Row], **wanted: Any) -> Row | None:
    """Return the first row with these values that could be reached."""
    for row in rows:
        if UNREACHABLE not in row and all(row.get(name) == value for name, value in wanted.items()):
            return row
    return None


def write_cells(cells: Sequence[Cell], path: Path) -> Path:
    """Write cells as CSV, not rounded; what a cell does not have is left empty."""
    if not cells:
        raise InputError(f"{path}: expected measurements, got none; ask for at least one ratio")
    measured = [each.name for each in fields(Judged)]
    columns = list(
        dict.fromkeys(
            [*(n for c in cells for n in c.names), *measured, *(n for c in cells for n in c.more), UNREACHABLE]
        )
    )
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, columns, restval="", lineterminator="\n")
        writer.writeheader()
        for each in cells:
            found = asdict(each.judged) if each.judged else {UNREACHABLE: each.unreachable}
            writer.writerow({**each.names, **found, **each.more})
    return path


def shown(found: Judged | None, is_reference: bool = False) -> list[str]:
    """Return KL, perplexity and both differences as text."""
    if found is None:
        return ["", "unreachable", "", ""]
    differences = [
        f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]"
        for difference, low, high in (
            (found.kl_difference, found.kl_low, found.kl_high),
            (found.loss_difference, found.loss_low, found.loss_high),
        )
    ]
    if is_reference:
        differences = ["the reference"] * 2
    number = found.token_perplexity
    as_text = f"{number:.2f}" if number < 1e4 else f"{number:.2e}"
    return [f"{found.kl_divergence:.3f}", differences[0], as_text, differences[1]]


SHOWN = ("KL", "above the reference", "perplexity", "loss above the ref.")
"""Header of `shown`."""


def verdict_of(found: Judged) -> str:
    """Say how the loss on the evaluation text stands to the reference's."""
    sure = "surely worse" if found.loss_low > 0 else "surely better" if found.loss_high < 0 else "not surely apart"
    return f"{sure} ({found.loss_difference:+.3f} nats a token, [{found.loss_low:+.3f}, {found.loss_high:+.3f}])"


def series(cells: Sequence[Cell], name: str, step: Callable[[Cell], int], values: Sequence[str] = ()) -> list[Series]:
    """Return KL, perplexity, achieved ratio and more as MLflow takes them.

    Args:
        cells: Of one child.
        name: Of the steps, e.g. `gamma_percent`.
        step: A cell's step.
        values: Of `Cell.more`.
    """
    reached = [each for each in cells if each.judged]
    own = ("kl_divergence", "token_perplexity", "achieved_ratio")
    result = []
    for metric in (*own, *values):
        found = (getattr(each.found, metric) if metric in own else each.more[metric] for each in reached)
        points = [(step(each), float(value)) for each, value in zip(reached, found, strict=True)]
        result.append(Series(f"{metric}_by_{name}", points))
    return result
