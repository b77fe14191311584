"""The leaderboard as one picture: perplexity against ratio, without and with compensation."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from nirvana.files import atomic_file
from tasks.plots import _STYLE, PALETTE, _axes, _canvas, _svg, _text
from tasks.studies.compare import DENSE
from tasks.studies.leaderboard import Line

WIDTH, HEIGHT = 1040, 456
_MARGIN, _TOP, _PANEL, _GAP = 16, 62, 320, 24
_ROOM = 108  # pixels to the right of each panel for names
_AXIS = 34  # and to its left for numbers
DPI = 144
# ours and the paper's in the house colours; all rivals keep theirs whichever are shown
_LOOK: dict[str, dict[str, Any]] = {
    "fisher": {"color": PALETTE["kept"], "marker": "o", "linewidth": 2.6, "zorder": 5},
    "nirvana": {"color": PALETTE["removed"], "marker": "s", "linewidth": 2.6, "zorder": 4},
    "flap": {"color": "#00806a", "marker": "^"},
    "llm_pruner": {"color": "#a8488f", "marker": "D"},
    "wanda_sp": {"color": "#7a6a00", "marker": "v"},
    "shortgpt": {"color": "#4a90c2", "marker": "P"},
    "slicegpt": {"color": "#3c4e9c", "marker": "p"},
    "lm_loss": {"color": "#8a5a3c", "marker": "X"},
    "magnitude": {"color": "#6b6f75", "marker": "<"},
    "random": {"color": "#6b6f75", "marker": ">"},
}
_OTHER: dict[str, Any] = {"color": PALETTE["muted"], "marker": "d"}
_TITLES = {
    "nirvana": "NIRVANA",
    "fisher": "mask Fisher",
    "flap": "FLAP",
    "llm_pruner": "LLM-Pruner",
    "wanda_sp": "Wanda-sp",
    "shortgpt": "ShortGPT",
    "slicegpt": "SliceGPT",
    "lm_loss": "LM loss",
}
_WORST = 30.0  # times the dense perplexity: beyond it a model says nothing, and would squeeze the rest
_LINE = 15  # pixels between names


def draw(lines: Sequence[Line], png: Path) -> list[Path]:
    """Draw both panels; write the picture as PNG and, beside it, as SVG.

    Args:
        lines: The leaderboard.
        png: Where; the SVG takes the same name.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the bytes
        matplotlib.rcParams.update(_STYLE)
        figure = _figure(lines)
        svg = png.with_suffix(".svg")
        with atomic_file(svg) as temporary:
            temporary.write_text(_svg(figure, "leaderboard") + "\n", encoding="utf-8")
        with atomic_file(png) as temporary:
            figure.set_dpi(DPI)
            FigureCanvasAgg(figure).print_png(temporary)
    return [png, svg]


def _figure(lines: Sequence[Line]) -> Figure:
    figure = _canvas(WIDTH, HEIGHT)
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
        _text(figure, left, 24, title, weight="bold")
        _text(figure, left, 42, measure, color=PALETTE["muted"], fontsize=11)
        right = WIDTH - left - width + _ROOM
        axes = _axes(figure, left + _AXIS, _TOP, right, _PANEL)
        beyond = _panel(axes, shown, dense, limits, sorted({line.ratio for line in pruned}))
        if beyond:
            note = f"off the scale: {', '.join(beyond)}"
            _text(figure, left + _AXIS, HEIGHT - 28, note, color=PALETTE["muted"], fontsize=11)
    if any(line.off_budget for line in pruned):
        note = "hollow: more than 0.5 point off the budget"
        _text(figure, _MARGIN + _AXIS, HEIGHT - 10, note, color=PALETTE["muted"], fontsize=11)
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
        look = {"linewidth": 1.5, "zorder": 3, **_LOOK.get(method, _OTHER)}
        name = _TITLES.get(method, method.replace("_", " ")) + (" + bias" if compensation == "bias" else "")
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
    _name_lines(axes, labels, limits)
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


def _name_lines(axes: Axes, labels: Sequence[tuple[str, float, str, str]], limits: tuple[float, float]) -> None:
    """Write each name at the right of where its line ends, moved apart where they would touch."""
    low, high = np.log(limits)
    ordered = sorted(labels, key=lambda label: label[1])
    wanted = [(math.log(value) - low) / (high - low) * _PANEL for _, value, _, _ in ordered]
    for (name, value, color, weight), place in zip(ordered, apart(wanted, _LINE, _PANEL), strict=True):
        end = (math.log(value) - low) / (high - low) * _PANEL
        moved = abs(place - end) > 3
        axes.annotate(
            name,
            (1, end / _PANEL),
            xycoords="axes fraction",
            xytext=(16, place - end),
            textcoords="offset points",
            va="center",
            color=color,
            weight=weight,
            fontsize=11,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.7,
                "shrinkA": 1,
                "shrinkB": 2,
                "relpos": (0, 0.5),
            }
            if moved
            else None,
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
