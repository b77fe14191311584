"""One picture for every sweep: panels of curves with error bars, each curve named where it ends."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator

from studies.picture import End, name_ends, write_picture
from studies.sweep.cells import Cell
from tasks.pictures.canvas import PALETTE, add_axes, new_canvas, write_text

WIDTH = 1040
_MARGIN, _TOP, _PANEL, _GAP, _BELOW = 16, 54, 238, 24, 48
_AXIS, _ROOM = 44, 112  # pixels for numbers and for names
LOOKS = (  # colour and shape both tell curves apart
    (PALETTE["kept"], "o"),
    (PALETTE["removed"], "s"),
    ("#00806a", "^"),
    ("#a8488f", "D"),
)


@dataclass(frozen=True)
class Spot:
    """One measurement and the interval of it; hollow: not quite what was asked for."""

    x: float
    y: float
    low: float
    high: float
    hollow: bool = False


@dataclass(frozen=True)
class Curve:
    """Measurements in the order of x, under a name; `look` is a number of `LOOKS`."""

    name: str
    spots: Sequence[Spot]
    look: int


@dataclass(frozen=True)
class Level:
    """A value that does not depend on x."""

    name: str
    value: float
    look: int | None = None
    """None: grey, for the dense model."""


@dataclass(frozen=True)
class Panel:
    """One measure against x.

    Attributes:
        title: What is shown.
        measure: In which unit, and what the bars are.
        x: What x is.
        ticks: Where x is labelled, in the order of their labels.
        labels: Of the ticks.
        marked: An x that a line marks, and its name.
        log: Whether y is logarithmic.
        log_x: Whether x is.
    """

    title: str
    measure: str
    x: str
    ticks: Sequence[float]
    labels: Sequence[str]
    curves: Sequence[Curve]
    levels: Sequence[Level] = field(default_factory=tuple)
    marked: tuple[float, str] | None = None
    log: bool = False
    log_x: bool = False


def draw(name: str, panels: Sequence[Panel], png: Path, notes: Sequence[str] = ()) -> list[Path]:
    """Draw panels, two a row; write the picture as PNG and, beside it, as SVG.

    Args:
        name: Unique to the picture.
        panels: In reading order.
        png: Where; the SVG takes the same name.
        notes: Lines below.
    """
    return write_picture(png, name, lambda: _figure(panels, notes))


def _figure(panels: Sequence[Panel], notes: Sequence[str]) -> Figure:
    rows = -(-len(panels) // 2)
    row = _TOP + _PANEL + _BELOW
    height = rows * row + 18 * len(notes) + 10
    figure = new_canvas(WIDTH, height)
    width = (WIDTH - 2 * _MARGIN - _GAP) / 2
    for number, panel in enumerate(panels):
        left, top = _MARGIN + number % 2 * (width + _GAP), number // 2 * row
        write_text(figure, left, top + 24, panel.title, weight="bold")
        write_text(figure, left, top + 42, panel.measure, color=PALETTE["muted"], fontsize=11)
        axes = add_axes(figure, left + _AXIS, top + _TOP, WIDTH - left - width + _ROOM, _PANEL)
        _panel(axes, panel)
    for number, note in enumerate(notes):
        write_text(figure, _MARGIN, rows * row + 8 + 18 * number, note, color=PALETTE["muted"], fontsize=11)
    return figure


def _panel(axes: Axes, panel: Panel) -> None:
    if panel.log:
        axes.set_yscale("log")
    if panel.log_x:
        axes.set_xscale("log")
    ends = []
    for number, curve in enumerate(panel.curves):
        colour, marker = LOOKS[curve.look % len(LOOKS)]
        if not curve.spots:
            continue
        aside = number - (len(panel.curves) - 1) / 2  # so that no bar hides another
        x, y = [_aside(panel, spot.x, aside) for spot in curve.spots], [spot.y for spot in curve.spots]
        reach = [[spot.y - spot.low for spot in curve.spots], [spot.high - spot.y for spot in curve.spots]]
        # a bar of no length is the reference's: it has none
        axes.errorbar(x, y, reach, color=colour, marker="", capsize=3, linewidth=1.8, elinewidth=1.2, zorder=3)
        for at, spot in zip(x, curve.spots, strict=True):
            fill = PALETTE["paper"] if spot.hollow else colour
            axes.plot(at, spot.y, marker, color=colour, markerfacecolor=fill, markersize=6, zorder=4)
        ends.append((curve.name, y[-1], colour))
    for level in panel.levels:
        colour = PALETTE["dense"] if level.look is None else LOOKS[level.look % len(LOOKS)][0]
        axes.axhline(level.value, color=colour, linewidth=1.4, linestyle="-" if level.look is None else "--", zorder=2)
        ends.append((level.name, level.value, PALETTE["muted"] if level.look is None else colour))
    if panel.marked is not None:
        last = panel.marked[0] == max(panel.ticks)  # right of it the curves' names begin
        axes.axvline(panel.marked[0], color=PALETTE["rule"], linewidth=1.5, zorder=1)
        axes.annotate(
            panel.marked[1],
            (panel.marked[0], 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if last else 4, -2),
            textcoords="offset points",
            ha="right" if last else "left",
            va="top",
            color=PALETTE["muted"],
            fontsize=11,
        )
    _scale(axes, panel)
    _name(axes, ends, panel.log)


def _aside(panel: Panel, x: float, by: float) -> float:
    low, high = min(panel.ticks), max(panel.ticks)
    return x * (high / low) ** (0.012 * by) if panel.log_x else x + 0.012 * by * (high - low)


def _scale(axes: Axes, panel: Panel) -> None:
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(FixedLocator(list(panel.ticks)))
    axes.set_xticklabels(list(panel.labels))
    low, high = min(panel.ticks), max(panel.ticks)
    if panel.log_x:
        pad = (high / low) ** 0.05 if high > low else 1.5
        axes.set_xlim(low / pad, high * pad)
    else:
        pad = 0.05 * (high - low) or 0.5
        axes.set_xlim(low - pad, high + pad)
    axes.set_xlabel(panel.x, labelpad=4)
    bottom, top = axes.get_ylim()
    if panel.log:
        ticks = _log_ticks(bottom, top)
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_yticklabels([f"{tick:,g}" for tick in ticks])
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylim(bottom, top)
    axes.grid(axis="y", color=PALETTE["rule"], linewidth=0.8)
    axes.set_axisbelow(True)


def _log_ticks(low: float, high: float) -> list[float]:
    """Return round values within the limits: the coarsest steps that give three or more."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(n / 10 for n in range(10, 100, 2))):
        found = [step * 10.0**power for power in decades for step in steps if low <= step * 10.0**power <= high]
        if len(found) >= 3:
            break
    return found[:: max(1, len(found) // 6)]


def _name(axes: Axes, ends: Sequence[tuple[str, float, str]], log: bool) -> None:
    """Write each name at the right of where its curve ends, moved apart where they would touch."""
    low, high = axes.get_ylim()

    def place(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return share * _PANEL

    name_ends(axes, [End(name, place(value), colour) for name, value, colour in ends], _PANEL, 16, in_place=6)


# --- curves of cells --------------------------------------------------------------------------------------------


def kl_spot(cell: Cell, x: float, hollow: bool = False) -> Spot:
    """Return the KL of a cell and its interval."""
    return Spot(x, cell.found.kl_divergence, *cell.found.kl_interval(), hollow)


def perplexity_spot(cell: Cell, x: float, hollow: bool = False) -> Spot:
    """Return the perplexity of a cell and its interval."""
    return Spot(x, cell.found.token_perplexity, *cell.found.perplexity_interval(), hollow)
