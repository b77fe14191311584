"""A study's picture: panels of curves with error bars, or of intervals side by side, as its spec says.

Curves are named where they end. Methods look alike in every picture.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator

from nirvana.files import atomic_file
from studies.lines import Line, worded
from studies.measure import UNREACHABLE
from studies.variants import DENSE
from tasks.pictures.canvas import PALETTE, add_axes, new_canvas, styled, to_svg, write_text

DPI = 144
WIDTH = 1040
LINE = 15  # pixels from name to name
_MARGIN, _TOP, _PANEL, _GAP, _BELOW = 16, 54, 238, 24, 48
_AXIS, _ROOM, _NAMES = 44, 128, 150  # pixels for numbers, for names of curves and of rows
_WORST = 30.0  # times the least: beyond it a model says nothing, and would squeeze the rest
# ours and the paper's in the house colours; all others keep theirs whichever are shown
LOOKS = {
    "fisher": (PALETTE["kept"], "o"),
    "nirvana": (PALETTE["removed"], "s"),
    "flap": ("#00806a", "^"),
    "llm_pruner": ("#a8488f", "D"),
    "wanda_sp": ("#7a6a00", "v"),
    "shortgpt": ("#4a90c2", "P"),
    "slicegpt": ("#3c4e9c", "p"),
    "lm_loss": ("#8a5a3c", "X"),
    "magnitude": ("#6b6f75", "<"),
    "random": ("#6b6f75", ">"),
    DENSE: (PALETTE["ink"], "*"),
}
_OTHERS = [*LOOKS.values()]
_DASHES = ("-", "--", ":", "-.")


class Spot(NamedTuple):
    """One measurement and the interval of it."""

    x: float
    y: float
    low: float
    high: float
    hollow: bool


class Curve(NamedTuple):
    """Spots under a name, as they look."""

    name: str
    spots: Sequence[Spot]
    colour: str
    marker: str
    dashes: str


def draw(picture: Mapping[str, Any], tables: Mapping[str, Sequence[Line]], name: str, png: Path) -> list[Path]:
    """Draw panels, two a row; write the picture as PNG and, beside it, as SVG.

    Args:
        picture: Of a spec: `panels` in reading order, and `notes` below them.
        tables: Lines by the table's name.
        name: Unique to the picture.
        png: Where; the SVG takes the same name.
    """
    panels = []
    for panel in picture["panels"]:
        lines = [line for line in tables[panel.get("table", "")] if UNREACHABLE not in line]
        lines = [line for line in lines if line.get("method") == DENSE or _is_wanted(line, panel.get("only", {}))]
        titles = dict.fromkeys(worded(panel["title"], line) for line in lines if line.get("method") != DENSE)
        for title in titles:
            mine = [x for x in lines if x.get("method") == DENSE or worded(panel["title"], x) == title]
            panels.append((title, panel, mine))
    return write_picture(png, name, lambda: _figure(panels, picture.get("notes", ())))


def _is_wanted(line: Line, wanted: Mapping[str, Any]) -> bool:
    return all(line.get(name) in (value if isinstance(value, list) else [value]) for name, value in wanted.items())


def _figure(panels: Sequence[tuple[str, Mapping[str, Any], Sequence[Line]]], notes: Sequence[str]) -> Figure:
    row, rows = _TOP + _PANEL + _BELOW, -(-len(panels) // 2)
    figure = new_canvas(WIDTH, rows * row + 18 * len(notes) + 10)
    width = (WIDTH - 2 * _MARGIN - _GAP) / 2
    for number, (title, panel, lines) in enumerate(panels):
        left, top = _MARGIN + number % 2 * (width + _GAP), number // 2 * row
        write_text(figure, left, top + 24, title, weight="bold")
        write_text(figure, left, top + 42, panel["measure"], color=PALETTE["muted"], fontsize=11)
        beside = WIDTH - left - width
        if "row" in panel:
            _rows_panel(add_axes(figure, left + _NAMES, top + _TOP, beside + _ROOM / 2, _PANEL), panel, lines)
        else:
            _curves_panel(add_axes(figure, left + _AXIS, top + _TOP, beside + _ROOM, _PANEL), panel, lines)
    for number, note in enumerate(notes):
        write_text(figure, _MARGIN, rows * row + 8 + 18 * number, note, color=PALETTE["muted"], fontsize=11)
    return figure


def curves_of(panel: Mapping[str, Any], lines: Sequence[Line], ticks: Sequence[Any]) -> list[Curve]:
    """Return a curve a name, in the order of x; of one method the second curve is dashed."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        if line.get(panel["x"]) is not None and line.get(panel["y"]) is not None and _is_drawn(line, panel):
            found.setdefault(worded(panel["curve"], line), []).append(line)
    curves, seen = [], dict.fromkeys(_OTHERS, 0)
    for number, (name, members) in enumerate(found.items()):
        look = LOOKS.get(members[0].get("method", "")) if panel.get("look", True) else None
        look = look or _OTHERS[number % len(_OTHERS)]
        spots = sorted(_spot(line, panel, ticks) for line in members)
        curves.append(Curve(name, spots, *look, _DASHES[seen[look] % len(_DASHES)]))
        seen[look] += 1
    return curves


def _is_drawn(line: Line, panel: Mapping[str, Any]) -> bool:
    """Tell whether a line is on a curve: the dense model is a level, unless the panel says otherwise."""
    return line.get("method") != DENSE or bool(panel.get("dense_curve"))


def _spot(line: Line, panel: Mapping[str, Any], ticks: Sequence[Any]) -> Spot:
    x = line[panel["x"]]
    return Spot(
        ticks.index(x) if panel.get("ordinal") else x * panel.get("x_scale", 1),
        line[panel["y"]],
        *interval_of(line, panel),
        bool(line.get(panel.get("hollow", ""))),
    )


def interval_of(line: Line, panel: Mapping[str, Any]) -> tuple[float, float]:
    """Return the interval of y: its own columns, or a difference's moved to where the reference is."""
    y, names = line[panel["y"]], panel.get("bars", ())
    if any(line.get(name) is None for name in names) or not names:
        return y, y
    if len(names) == 1:  # a deviation
        return y - line[names[0]], y + line[names[0]]
    *difference, low, high = (line[name] for name in names)
    if not difference:
        return low, high
    if panel.get("bars_log"):  # y is exp of what differs
        reference = y * math.exp(-difference[0])
        return reference * math.exp(low), reference * math.exp(high)
    return y - difference[0] + low, y - difference[0] + high


def _curves_panel(axes: Axes, panel: Mapping[str, Any], lines: Sequence[Line]) -> None:
    ticks = sorted({line[panel["x"]] for line in lines if _is_drawn(line, panel) and line.get(panel["x"]) is not None})
    curves = curves_of(panel, lines, ticks)
    log_x, log_y = panel.get("log_x", False), panel.get("log", False)
    axes.set_xscale("log" if log_x else "linear")
    axes.set_yscale("log" if log_y else "linear")
    places = list(range(len(ticks))) if panel.get("ordinal") else [tick * panel.get("x_scale", 1) for tick in ticks]
    low, high = (min(places), max(places)) if places else (0, 1)
    ends = []
    for number, curve in enumerate(curves):
        aside = 0.012 * (number - (len(curves) - 1) / 2) if "bars" in panel else 0.0  # so that no bar hides another
        at = [_aside(spot.x, aside, low, high, log_x) for spot in curve.spots]
        y = [spot.y for spot in curve.spots]
        reach = [[max(0.0, s.y - s.low) for s in curve.spots], [max(0.0, s.high - s.y) for s in curve.spots]]
        dashes = "" if panel.get("scatter") else curve.dashes
        look: dict[str, Any] = {"color": curve.colour, "zorder": 3, "linestyle": dashes}
        axes.errorbar(at, y, reach, marker="", capsize=3, linewidth=1.8, elinewidth=1.2, **look)
        for place, spot in zip(at, curve.spots, strict=True):
            fill = PALETTE["paper"] if spot.hollow else curve.colour
            axes.plot(place, spot.y, curve.marker, color=curve.colour, markerfacecolor=fill, markersize=6, zorder=4)
        ends.append((curve.name, y[-1], curve.colour))
    for line in lines:
        if line.get(panel["y"]) is None or not (_is_level(line, panel)):
            continue
        colour = PALETTE["dense"] if line.get("method") == DENSE else PALETTE["muted"]
        axes.axhline(line[panel["y"]], color=colour, linewidth=1.4, linestyle="--", zorder=2)
        ends.append((DENSE if line.get("method") == DENSE else worded(panel["level"], line), line[panel["y"]], colour))
    if "marked" in panel:
        x, name = panel["marked"]
        _mark(axes, x, name, is_last=x == max(ticks, default=0))
    _scale_x(axes, panel, places, ticks)
    _scale_y(axes, log_y)
    bottom, top = axes.get_ylim()

    def height(value: float) -> float:
        share = math.log(value / bottom) / math.log(top / bottom) if log_y else (value - bottom) / (top - bottom)
        return min(max(share, 0.0), 1.0) * _PANEL

    beyond = [name for name, value, _ in ends if value > top]
    names = [End(f"{name} ↑" if name in beyond else name, height(value), colour) for name, value, colour in ends]
    name_ends(axes, names, _PANEL, 16, in_place=6)


def _is_level(line: Line, panel: Mapping[str, Any]) -> bool:
    if line.get("method") == DENSE:
        return bool(panel.get("dense")) and not panel.get("dense_curve")
    return "level" in panel and line.get(panel["x"]) is None


def _aside(x: float, by: float, low: float, high: float, is_log: bool) -> float:
    return x * (high / low) ** by if is_log else x + by * (high - low)


def _mark(axes: Axes, x: float, name: str, is_last: bool) -> None:
    axes.axvline(x, color=PALETTE["rule"], linewidth=1.5, zorder=1)
    axes.annotate(
        name,
        (x, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-4 if is_last else 4, -2),  # right of the last the curves' names begin
        textcoords="offset points",
        ha="right" if is_last else "left",
        va="top",
        color=PALETTE["muted"],
        fontsize=11,
    )


def _scale_x(axes: Axes, panel: Mapping[str, Any], places: Sequence[float], ticks: Sequence[Any]) -> None:
    axes.set_xlabel(panel.get("x_label", panel["x"]), labelpad=4)
    low, high = (min(places), max(places)) if places else (0, 1)
    if panel.get("log_x"):
        pad = (high / low) ** 0.05 if high > low else 1.5
        axes.set_xlim(low / pad, high * pad)
    else:
        pad = 0.05 * (high - low) or 0.5
        axes.set_xlim(low - pad, high + pad)
    axes.xaxis.set_minor_locator(NullLocator())
    if len(places) > 8:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        return
    axes.xaxis.set_major_locator(FixedLocator(list(places)))
    labels = [f"{tick:g}" if isinstance(tick, int | float) else str(tick) for tick in ticks]
    if panel.get("x_scale"):
        labels = [f"{place:.3g}" for place in places]
    axes.set_xticklabels(labels)


def _scale_y(axes: Axes, is_log: bool) -> None:
    bottom, top = axes.get_ylim()
    if is_log:
        top = min(top, _WORST * axes.dataLim.y0 if axes.dataLim.y0 > 0 else top)
        ticks = log_ticks(bottom, top)
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_yticklabels([f"{tick:,g}" for tick in ticks])
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylim(bottom, top)
    axes.grid(axis="y", color=PALETTE["rule"], linewidth=0.8)
    axes.set_axisbelow(True)


def log_ticks(low: float, high: float) -> list[float]:
    """Return round values within the limits: the coarsest steps that give three or more."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(n / 10 for n in range(10, 100, 2))):
        found = [step * 10.0**power for power in decades for step in steps if low <= step * 10.0**power <= high]
        if len(found) >= 3:
            break
    return found[:: max(1, len(found) // 6)]


def _rows_panel(axes: Axes, panel: Mapping[str, Any], lines: Sequence[Line]) -> None:
    """Draw an interval a line, in a row a name; curves are told apart by colour."""
    drawn = [line for line in lines if line.get(panel["y"]) is not None and _is_drawn(line, panel)]
    rows = list(dict.fromkeys(worded(panel["row"], line) for line in drawn))
    kinds = list(dict.fromkeys(worded(panel["curve"], line) for line in drawn))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.axvline(0, color=PALETTE["ink"], linewidth=1, zorder=1)
    for line in drawn:
        kind = kinds.index(worded(panel["curve"], line))
        y = rows.index(worded(panel["row"], line)) + (kind - (len(kinds) - 1) / 2) * 0.7 / max(1, len(kinds))
        colour, marker = _OTHERS[kind % len(_OTHERS)]
        low, high = interval_of(line, panel)
        x = line[panel["y"]]
        axes.errorbar([x], [y], xerr=[[x - low], [high - x]], fmt=marker, color=colour, markersize=5, elinewidth=1.4)
    for number, label in enumerate(kinds):
        colour, marker = _OTHERS[number % len(_OTHERS)]
        axes.plot([], [], marker, color=colour, markersize=5, label=label)
    if len(kinds) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(1.01, 0), fontsize=10)
    axes.set_yticks(range(len(rows)), rows, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
    axes.grid(axis="x", color=PALETTE["rule"], linewidth=0.8)
    axes.spines["left"].set_visible(False)
    axes.set_axisbelow(True)
    axes.set_xlabel(panel.get("x_label", panel["y"]), labelpad=4)


def write_picture(png: Path, name: str, figure_of: Callable[[], Figure]) -> list[Path]:
    """Write a picture as PNG and, beside it, as SVG; return both.

    Args:
        png: Where; the SVG takes the same name.
        name: Unique to the picture, for ids within the SVG.
        figure_of: Draws it.
    """
    svg = png.with_suffix(".svg")
    with styled():
        figure = figure_of()
        with atomic_file(svg) as temporary:
            temporary.write_text(to_svg(figure, name) + "\n", encoding="utf-8")
        with atomic_file(png) as temporary:
            figure.set_dpi(DPI)
            FigureCanvasAgg(figure).print_png(temporary)
    return [png, svg]


class End(NamedTuple):
    """A name, and where its curve ends: pixels above the foot of the axes."""

    name: str
    height: float
    color: str
    weight: str = "normal"


def name_ends(axes: Axes, ends: Sequence[End], panel: float, gap: float, in_place: float | None = None) -> None:
    """Write each name at the right of where its curve ends, moved apart where they would touch.

    Args:
        axes: Where the curves are.
        ends: Of the curves.
        panel: Height of the axes in pixels.
        gap: Pixels from the axes to a name.
        in_place: The same for a name that did not have to move.
    """
    ordered = sorted(ends, key=lambda end: end.height)
    for end, place in zip(ordered, apart([end.height for end in ordered], LINE, panel), strict=True):
        moved = abs(place - end.height) > 3
        thread = {
            "arrowstyle": "-",
            "color": end.color,
            "linewidth": 0.7,
            "shrinkA": 1,
            "shrinkB": 2,
            "relpos": (0, 0.5),
        }
        axes.annotate(
            end.name,
            (1, end.height / panel),
            xycoords="axes fraction",
            xytext=(gap if moved or in_place is None else in_place, place - end.height),
            textcoords="offset points",
            va="center",
            color=end.color,
            weight=end.weight,
            fontsize=11,
            annotation_clip=False,
            arrowprops=thread if moved else None,
        )


def apart(wanted: Sequence[float], distance: float, room: float) -> list[float]:
    """Return places at least `distance` apart, in the order of and as near as may be to those wanted (ascending)."""
    places = [float(place) for place in wanted]
    for _ in range(200):
        for index in range(1, len(places)):
            lacking = distance - (places[index] - places[index - 1])
            if lacking > 1e-6:
                places[index - 1] -= lacking / 2
                places[index] += lacking / 2
        if places and places[0] < 0:
            places[0] = 0.0
        if places and places[-1] > room:
            places[-1] = room
    return places
