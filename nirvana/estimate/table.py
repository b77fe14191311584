"""Estimates as a person reads them: one line a step, what fits this machine, and what `auto` would take."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from nirvana.estimate.steps import FITS, StepEstimate


def estimate_table(estimates: Sequence[StepEstimate], free_bytes: int, title: str) -> Table:
    """Return the table: each step in its ways of computing, the largest that fits first.

    Args:
        estimates: Of `nirvana.estimate.steps.estimate`.
        free_bytes: What this machine has left.
        title: Printed above it.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("step", "weights, memory"):
        table.add_column(heading, no_wrap=True)
    for heading in ("peak", "disk", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for each in estimates:
        low, high = each.seconds
        table.add_row(
            each.step,
            way(each),
            _bytes(each.peak_bytes),
            _bytes(each.disk_bytes) if each.disk_bytes else "",
            _range(low, high),
            fits(each, free_bytes),
        )
    return table


def way(estimate: StepEstimate) -> str:
    """Return a way of computing in two words."""
    if estimate.step == "collect_gradients":
        return f"{estimate.execution}, {estimate.memory}"
    return estimate.execution


def fits(estimate: StepEstimate, free_bytes: int) -> str:
    """Return yes, tight (more than `auto` would fill) or no."""
    if estimate.peak_bytes <= FITS * free_bytes:
        return "yes"
    return "tight" if estimate.peak_bytes <= free_bytes else "no"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _range(low: float, high: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if high >= 1.5 * length:
            return f"{low / length:.1f}-{high / length:.1f} {unit}"
    return f"{low:.0f}-{high:.0f} s"
