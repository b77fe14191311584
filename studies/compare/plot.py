"""The leaderboard as one picture: perplexity against ratio, without and with compensation."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from studies.compare.leaderboard import Line
from studies.comparison import DENSE
from studies.picture import METHOD_LOOKS, OTHER_LOOK, End, name_ends, write_picture
from studies.titles import titled
from tasks.pictures.canvas import PALETTE, add_axes, new_canvas, write_text

WIDTH, HEIGHT = 1040, 456
_MARGIN, _TOP, _PANEL, _GAP = 16, 62, 320, 24
_ROOM = 108  # pixels to the right of each panel for names
_AXIS = 34  # and to its left for numbers
_WORST = 30.0  # times the dense perplexity: beyond it a model says nothing, and would squeeze the rest


def draw(lines: Sequence[Line], png: Path) -> list[Path]:
    """Draw both panels; write the picture as PNG and, beside it, as SVG.

    Args:
        lines: The leaderboard.
        png: Where; the SVG takes the same name.
    """
    return write_picture(png, "leaderboard", lambda: _figure(lines))


def _figure(lines: Sequence[Line]) -> Figure:
    figure = new_canvas(WIDTH, HEIGHT)
    dense = next(line.token_perplexity for line in lines if line.method == DENSE)
    pruned = [line for line in lines if line.method != DENSE]
    limits = _limits(dense, [line.token_perplexity for line in pruned])
    width = (WIDTH - 2 * _MARGIN - _GAP) / 2
    plain = [line for line in pruned if line.compensation == "none"]
    # FLAP's bias is part of the published method; what a bias gives the others is in the table
    own = [line for line in pruned if line.compensation == "bias" and line.method == "flap"]
    solved = [line for line in pruned if line.compensation == "least_squares"]
    solved_how = "output projections solved for by least squares" + ("; FLAP also with its own bias" if own else "")
    panels = (
        ("As selected", "token perplexity, log scale; lower is better", plain),
        ("With compensation", solved_how, solved + own),
    )
    for number, (title, measure, shown) in enumerate(panels):
        left = _MARGIN + number * (width + _GAP)
        write_text(figure, left, 24, title, weight="bold")
        write_text(figure, left, 42, measure, color=PALETTE["muted"], fontsize=11)
        right = WIDTH - left - width + _ROOM
        axes = add_axes(figure, left + _AXIS, _TOP, right, _PANEL)
        beyond = _panel(axes, shown, dense, limits, sorted({line.ratio for line in pruned}))
        if beyond:
            note = f"off the scale: {', '.join(beyond)}"
            write_text(figure, left + _AXIS, HEIGHT - 28, note, color=PALETTE["muted"], fontsize=11)
    if any(line.off_budget for line in pruned):
        note = "hollow: more than 0.5 point off the budget"
        write_text(figure, _MARGIN + _AXIS, HEIGHT - 10, note, color=PALETTE["muted"], fontsize=11)
    return figure


def _limits(dense: float, values: Sequence[float]) -> tuple[float, float]:
    inside = [value for value in values if value <= _WORST * dense] or [2 * dense]
    return dense * 0.9, max(*inside, 1.5 * dense) * 1.12


def _panel(
    axes: Axes, lines: Sequence[Line], dense: float, limits: tuple[float, float], ratios: Sequence[float]
) -> list[str]:
    """Draw one panel; return the names of what lies beyond it altogether."""
    axes.set_yscale("log")
    axes.set_ylim(*limits)
    spread = max(ratios) - min(ratios) or 0.2
    axes.set_xlim(min(ratios) - 0.06 * spread, max(ratios) + (0.02 if len(ratios) > 1 else 0.06) * spread)
    axes.axhline(dense, color=PALETTE["dense"], linewidth=2, zorder=1)
    labels = [("dense", dense, PALETTE["muted"], "normal")]
    beyond = []
    for method, compensation in dict.fromkeys((line.method, line.compensation) for line in lines):
        mine = [line for line in lines if (line.method, line.compensation) == (method, compensation)]
        mine.sort(key=lambda line: line.ratio)
        look = {"linewidth": 1.5, "zorder": 3, **METHOD_LOOKS.get(method, OTHER_LOOK)}
        name = titled(method) + (" + bias" if compensation == "bias" else "")
        values = [line.token_perplexity for line in mine]
        if all(value > limits[1] for value in values):
            beyond.append(name)
            continue
        axes.plot(
            [line.ratio for line in mine],
            values,
            markersize=0,
            linestyle="--" if compensation == "bias" else "-",
            **look,
        )
        for line in mine:
            fill = PALETTE["paper"] if line.off_budget else look["color"]
            axes.plot(
                line.ratio,
                line.token_perplexity,
                look["marker"],
                color=look["color"],
                markerfacecolor=fill,
                markersize=6.5,
                zorder=look["zorder"] + 0.5,
            )
        weight = "bold" if method in ("fisher", "nirvana") else "normal"
        leaving = " ↑" if values[-1] > limits[1] else ""
        labels.append((name + leaving, min(values[-1], limits[1]), look["color"], weight))
    low, high = np.log(limits)
    ends = [End(name, (math.log(value) - low) / (high - low) * _PANEL, *look) for name, value, *look in labels]
    name_ends(axes, ends, _PANEL, 16)
    ticks = _ticks(limits)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticklabels([f"{tick:,g}" for tick in ticks])
    axes.set_xticks(list(ratios), [f"{ratio:g}" for ratio in ratios])
    axes.set_xlabel("pruning ratio", labelpad=4)
    axes.grid(axis="y", color=PALETTE["rule"], linewidth=0.8)
    axes.set_axisbelow(True)
    return beyond


def _ticks(limits: tuple[float, float]) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten, with 3 and 7 beside them where the axis is short."""
    low, high = (math.log10(limit) for limit in limits)
    steps = (1, 2, 5) if high - low > 0.9 else (1, 1.5, 2, 3, 4, 5, 7)
    every = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    return [value for value in every if limits[0] <= value <= limits[1]]
