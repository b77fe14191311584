"""Zero-shot accuracy against ratio as one picture: a panel a kind of item, a row of panels a text."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from studies.comparison import BEST, DENSE
from studies.picture import METHOD_LOOKS, OTHER_LOOK, End, name_ends, write_picture
from studies.titles import titled
from studies.zero_shot.items import CONTINUATION, LAST_WORD
from studies.zero_shot.summary import ALL, NIRVANA, Line
from tasks.evaluation.continuation import CHOICES
from tasks.pictures.canvas import PALETTE, add_axes, new_canvas, write_text

WIDTH = 1040
_MARGIN, _TOP, _PANEL, _GAP, _AXIS = 16, 62, 300, 28, 40
_ROOM = 140  # pixels to the right of each panel for names
_FOOT = 64  # and below it for the axis
_ASIDE = 9.0  # pixels between the error bars of one ratio
_MEASURES = {
    LAST_WORD: "right without a list of choices, percent",
    CONTINUATION: f"right among {CHOICES} endings, percent",
}
_SHORT = {"none": "", "bias": " + bias", "least_squares": " + LS"}


def draw(lines: Sequence[Line], png: Path) -> list[Path]:
    """Draw every panel; write the picture as PNG and, beside it, as SVG.

    Args:
        lines: `studies.zero_shot.summary.lines`.
        png: Where; the SVG takes the same name.
    """
    return write_picture(png, "zero-shot", lambda: _figure([line for line in lines if line.kind != ALL]))


def _figure(lines: Sequence[Line]) -> Figure:
    texts, kinds = ([*dict.fromkeys(getattr(line, name) for line in lines)] for name in ("text", "kind"))
    row = _TOP + _PANEL + _FOOT
    figure = new_canvas(WIDTH, row * len(texts) + 12)
    width = (WIDTH - 2 * _MARGIN - _GAP) / 2
    for top, text in enumerate(texts):
        for column, kind in enumerate(kinds):
            mine = [line for line in lines if (line.text, line.kind) == (text, kind)]
            if not mine:
                continue
            left = _MARGIN + column * (width + _GAP)
            title = f"{kind.capitalize()}: {mine[0].items:,} items of {text}"
            write_text(figure, left, row * top + 24, title, weight="bold")
            write_text(
                figure, left, row * top + 42, _MEASURES.get(kind, "right, percent"), color=PALETTE["muted"], fontsize=11
            )
            axes = add_axes(figure, left + _AXIS, row * top + _TOP, WIDTH - left - width + _ROOM, _PANEL)
            _panel(axes, mine, 1 / CHOICES if kind == CONTINUATION else None, width - _AXIS - _ROOM)
    note = "bars: 95 % intervals of the accuracy itself; all answer the same items, so differences are surer"
    if any(line.compensation == "least_squares" for line in lines):
        note += "; LS: output projections solved for by least squares"
    write_text(figure, _MARGIN + _AXIS, row * len(texts) + 2, note, color=PALETTE["muted"], fontsize=11)
    return figure


def _panel(axes: Axes, lines: Sequence[Line], chance: float | None, pixels: float) -> None:
    """Draw one panel.

    Args:
        axes: Where.
        lines: Of one text and kind.
        chance: Accuracy without any reading, if it is not about 0.
        pixels: Width of the axes.
    """
    dense = next(line for line in lines if line.method == DENSE)
    pruned = [line for line in lines if line.method != DENSE]
    ratios = sorted({line.ratio for line in pruned})
    spread = ratios[-1] - ratios[0] or 0.2
    # room at both ends for the bars that stand aside
    ways = sorted({(line.method, line.compensation) for line in pruned}, key=_rank)
    ends = (len(ways) + 1) / 2 * _ASIDE
    unit = spread / (pixels - 2 * ends)
    axes.set_xlim(ratios[0] - ends * unit, ratios[-1] + ends * unit)
    if len(ratios) == 1:
        axes.set_xlim(ratios[0] - 0.1, ratios[0] + 0.1)
        unit = 0.2 / pixels
    limits = _limits(lines, chance)
    axes.set_ylim(*limits)
    axes.axhspan(dense.accuracy_low, dense.accuracy_high, color=PALETTE["band"], linewidth=0, zorder=0)
    axes.axhline(dense.accuracy, color=PALETTE["dense"], linewidth=2, zorder=1)
    labels = [(DENSE, dense.accuracy, PALETTE["muted"], "normal")]
    if chance is not None:
        axes.axhline(chance, color=PALETTE["muted"], linewidth=1, dashes=(2, 2), zorder=1)
        labels.append(("chance", chance, PALETTE["muted"], "normal"))
    compensated = {method for method, compensation in ways if compensation != "none"}
    for number, (method, compensation) in enumerate(ways):
        mine = sorted(
            (x for x in pruned if (x.method, x.compensation) == (method, compensation)), key=lambda line: line.ratio
        )
        look = {"linewidth": 1.5, "zorder": 3, **METHOD_LOOKS.get(method, OTHER_LOOK)}
        first = (method, compensation) in (BEST, NIRVANA)
        plain = compensation == "none" and method in compensated
        aside = (number - (len(ways) - 1) / 2) * _ASIDE * unit
        places, values = [line.ratio + aside for line in mine], [line.accuracy for line in mine]
        reach = [
            [line.accuracy - line.accuracy_low for line in mine],
            [line.accuracy_high - line.accuracy for line in mine],
        ]
        axes.errorbar(places, values, reach, linestyle="", ecolor=look["color"], elinewidth=1.2, capsize=2.5, zorder=2)
        axes.plot(
            places,
            values,
            **(look | {"linewidth": 2.4 if first else 1.3}),
            linestyle="--" if plain else "-",
            markersize=7,
            markerfacecolor=PALETTE["paper"] if plain else look["color"],
        )
        name = titled(method) + _SHORT[compensation]
        labels.append((name, values[-1], look["color"], "bold" if first else "normal"))
    names = [End(name, (value - limits[0]) / (limits[1] - limits[0]) * _PANEL, *look) for name, value, *look in labels]
    name_ends(axes, names, _PANEL, 16)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))
    axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axes.set_xlabel("pruning ratio", labelpad=4)
    axes.grid(axis="y", color=PALETTE["rule"], linewidth=0.8)
    axes.set_axisbelow(True)


def _rank(way: tuple[str, str]) -> tuple[int, str]:
    """Order the bars: ours, NIRVANA, then the rivals, each method beside itself with compensation."""
    order = [*METHOD_LOOKS]
    return (order.index(way[0]) if way[0] in order else len(order), way[1])


def _limits(lines: Sequence[Line], chance: float | None) -> tuple[float, float]:
    low = min([line.accuracy_low for line in lines] + ([chance] if chance is not None else []))
    high = max(line.accuracy_high for line in lines)
    reach = max(high - low, 0.05)
    return max(0.0, low - 0.05 * reach), min(1.0, high + 0.05 * reach)
