"""The quantisation study as one picture: what perplexity so many bytes buy, and whether the damages add up."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from studies.comparison import DENSE
from studies.picture import LINE, apart, write_picture
from studies.quantised.summary import LEGEND, Cell, Sum, called
from studies.quantised.weights import STORED
from tasks.pictures.canvas import PALETTE, add_axes, new_canvas, write_text

WIDTH = 1040
_MARGIN, _TOP, _PANEL, _AXIS = 16, 62, 330, 34
_ROOM = 118  # pixels to the right of the first panel, for names
_FIRST = 616  # where the second begins
_NAMES = 136  # pixels to its left, for names
_MARKERS = {STORED: "o", "int8": "s", "int4": "^"}
_OTHER_MARKER = "D"
# ours and the paper's in the house colours
_COLOURS = {DENSE: PALETTE["ink"], "fisher": PALETTE["kept"], "nirvana": PALETTE["removed"]}
_DASHES = ((0, ()), (0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)))  # by ratio


def draw(lines: Sequence[Cell], sums: Sequence[Sum], png: Path) -> list[Path]:
    """Draw both panels; write the picture as PNG and, beside it, as SVG.

    Args:
        lines: Every cell, the dense model's first.
        sums: Those that are pruned and quantised.
        png: Where; the SVG takes the same name.
    """
    return write_picture(png, "quantised", lambda: _figure(lines, sums))


def _figure(lines: Sequence[Cell], sums: Sequence[Sum]) -> Figure:
    height = _TOP + _PANEL + 78
    figure = new_canvas(WIDTH, height)
    write_text(figure, _MARGIN, 24, "What so many bytes buy", weight="bold")
    measure = "token perplexity against bytes of all parameters (others as stored), log scales"
    write_text(figure, _MARGIN, 42, measure, color=PALETTE["muted"], fontsize=11)
    _bytes_panel(add_axes(figure, _MARGIN + _AXIS, _TOP, WIDTH - _FIRST + _ROOM, _PANEL), lines)
    write_text(figure, _FIRST, 24, "Does the damage add up?", weight="bold")
    measure = "loss increase of both together less the sum of each; nats a token, 95 %"
    write_text(figure, _FIRST, 42, measure, color=PALETTE["muted"], fontsize=11)
    if sums:
        _sums_panel(add_axes(figure, _FIRST + _NAMES, _TOP, _MARGIN, _PANEL), sums)
    else:
        write_text(figure, _FIRST, 80, "nothing was both pruned and quantised", color=PALETTE["muted"], fontsize=11)
    handles = [
        Line2D([], [], marker=_marker(each), linestyle="", color=PALETTE["muted"], markersize=7, label=_kind(each))
        for each in dict.fromkeys(line.precision for line in lines)
    ]
    if any(line.compensation == "least_squares" for line in lines):
        write_text(figure, _FIRST, height - 16, LEGEND, color=PALETTE["muted"], fontsize=11)
    corner = ((_MARGIN + _AXIS) / WIDTH, 12 / height)
    figure.legend(handles=handles, ncol=len(handles), loc="lower left", bbox_to_anchor=corner, fontsize=11)
    return figure


def _kind(precision: str) -> str:
    return {STORED: "as stored", "int8": "int8, a scale a row", "int4": "int4, a scale 64 weights"}.get(
        precision, precision
    )


def _marker(precision: str) -> str:
    return _MARKERS.get(precision, _OTHER_MARKER)


def _look(line: Cell | Sum, ratios: Sequence[float]) -> dict[str, Any]:
    dashes = _DASHES[0] if line.method == DENSE else _DASHES[ratios.index(line.ratio) % len(_DASHES)]
    return {"color": _COLOURS.get(line.method, PALETTE["muted"]), "linestyle": dashes}


def _bytes_panel(axes: Axes, lines: Sequence[Cell]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    sizes, values = [line.bytes / 1e6 for line in lines], [line.token_perplexity for line in lines]
    limits = (min(values) * 0.93, max(values) * 1.08)
    axes.set_ylim(*limits)
    axes.set_xlim(min(sizes) * 0.93, max(sizes) * 1.06)
    ratios = sorted({line.ratio for line in lines if line.method != DENSE})
    labels = []
    for key in dict.fromkeys((line.method, line.ratio, line.compensation) for line in lines):
        mine = [line for line in lines if (line.method, line.ratio, line.compensation) == key]
        mine.sort(key=lambda line: line.bytes)
        look = _look(mine[0], ratios)
        axes.plot([x.bytes / 1e6 for x in mine], [x.token_perplexity for x in mine], linewidth=1.8, **look)
        for line in mine:
            marker = _marker(line.precision)
            at = (line.bytes / 1e6, line.token_perplexity)
            axes.plot(*at, marker, color=look["color"], markersize=7, markeredgecolor=PALETTE["paper"])
        labels.append((called(mine[0]), mine[-1], look["color"]))
    _name_lines(axes, labels, limits)
    for axis, (low, high) in ((axes.yaxis, limits), (axes.xaxis, axes.get_xlim())):
        ticks = _ticks(low, high)
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_ticklabels([f"{tick:,g}" for tick in ticks])
    axes.set_xlabel("MB", labelpad=4)
    axes.grid(color=PALETTE["rule"], linewidth=0.8)
    axes.set_axisbelow(True)


def _ticks(low: float, high: float) -> list[float]:
    steps = (1, 2, 5) if math.log10(high / low) > 1.3 else (1, 1.5, 2, 3, 4, 5, 7)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]


def _name_lines(axes: Axes, labels: Sequence[tuple[str, Cell, str]], limits: tuple[float, float]) -> None:
    """Write each name at the right edge, level with its model as stored, moved apart where they would touch."""
    low, high = (math.log(limit) for limit in limits)
    ordered = sorted(labels, key=lambda label: label[1].token_perplexity)
    wanted = [(math.log(line.token_perplexity) - low) / (high - low) * _PANEL for _, line, _ in ordered]
    for (name, line, color), place in zip(ordered, apart(wanted, LINE, _PANEL), strict=True):
        axes.annotate(
            name,
            (line.bytes / 1e6, line.token_perplexity),
            xytext=(1 + 12 / (axes.get_position().width * WIDTH), place / _PANEL),
            textcoords="axes fraction",
            va="center",
            color=color,
            weight="bold" if line.method == DENSE else "normal",
            fontsize=11,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.6,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 5,
                "relpos": (0, 0.5),
            },
        )


def _sums_panel(axes: Axes, sums: Sequence[Sum]) -> None:
    axes.axvline(0, color=PALETTE["ink"], linewidth=1)
    places = range(len(sums), 0, -1)
    for line, place in zip(sums, places, strict=True):
        color = _COLOURS.get(line.method, PALETTE["muted"])
        reach = [[line.excess - line.low], [line.high - line.excess]]
        marker = _marker(line.precision)
        axes.errorbar([line.excess], [place], xerr=reach, fmt=marker, color=color, markersize=7, capsize=3)
    axes.set_yticks(list(places), [f"{called(line)} {line.precision}" for line in sums], fontsize=11)
    axes.set_ylim(0.4, len(sums) + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(5, symmetric=False))
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, -0.1 * (right - left)), max(right, 0.1 * (right - left)))
    axes.set_xlabel("above 0: more than the sum", labelpad=4)
    axes.grid(axis="x", color=PALETTE["rule"], linewidth=0.8)
    axes.spines["left"].set_visible(False)
    axes.set_axisbelow(True)
