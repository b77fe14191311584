"""The families as one picture: a panel a ratio, a line a method, a mark a family with its interval."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from studies.comparison import BEST
from studies.families.study import FAMILIES
from studies.families.summary import Line, ratios_of, ways_by_loss
from studies.picture import write_picture
from studies.titles import titled
from tasks.pictures.canvas import PALETTE, add_axes, new_canvas, write_text

WIDTH = 1040
_MARGIN, _TOP, _GAP, _BELOW, _TITLE = 16, 86, 28, 44, 26
_NAMES = 176  # pixels to the left of each row of panels, for names
_ROW, _MARK = 14, 8.5  # pixels of a method's row beside its marks, and of each mark
_LOOKS = (  # colour and shape both tell families apart
    (PALETTE["kept"], "o"),
    (PALETTE["removed"], "s"),
    ("#00806a", "^"),
    ("#a8488f", "D"),
    ("#7a6a00", "v"),
    ("#4a90c2", "P"),
)
_WORST = 4.0  # times the median loss above the reference: beyond it a bar says little, and would squeeze the rest


def draw(lines: Sequence[Line], png: Path) -> list[Path]:
    """Draw a panel a ratio, two a row; write the picture as PNG and, beside it, as SVG.

    Args:
        lines: `studies.families.summary.lines_of`.
        png: Where; the SVG takes the same name.
    """
    return write_picture(png, "families", lambda: _figure(lines))


def _figure(lines: Sequence[Line]) -> Figure:
    families = list(dict.fromkeys(line.family for line in lines))
    rivals = [line for line in lines if line.ratio > 0 and line.way != BEST]
    ways, ratios = ways_by_loss(rivals), ratios_of(lines)
    panel = len(ways) * (_ROW + _MARK * len(families))
    columns = min(2, len(ratios))
    row = panel + _BELOW + _TITLE
    figure = new_canvas(WIDTH, _TOP + -(-len(ratios) // columns) * row - _TITLE)
    width = (WIDTH - 2 * _MARGIN - _NAMES - (columns - 1) * _GAP) / columns
    muted: dict[str, Any] = {"color": PALETTE["muted"], "fontsize": 11}
    several = lines[0].models > 1
    models = f"{lines[0].models} trained models" if several else "one trained model"
    write_text(figure, _MARGIN, 24, f"Loss above {_title(BEST)}, {models} a family", weight="bold")
    bars = "95 % over windows and models" if several else "95 % over windows"
    write_text(figure, _MARGIN, 42, f"evaluation text, nats a token; right of the line: worse; bars: {bars}", **muted)
    for number, ratio in enumerate(ratios):
        left, top = _MARGIN + _NAMES + number % columns * (width + _GAP), _TOP + number // columns * row
        write_text(figure, left, top - 6, f"ratio {ratio:g}", weight="bold", fontsize=11)
        axes = add_axes(figure, left, top, WIDTH - left - width, panel)
        _panel(axes, [line for line in rivals if line.ratio == ratio], ways, families)
        axes.set_yticks(range(len(ways)), [_title(way) for way in ways] if number % columns == 0 else [], fontsize=11)
    handles = [
        Line2D([], [], marker=marker, linestyle="", markersize=6, color=colour, label=family)
        for family, (colour, marker) in ((family, _look(family)) for family in families)
    ]
    corner = (1 - _MARGIN / WIDTH, 1 - 12 / (figure.get_size_inches()[1] * 72))
    figure.legend(handles=handles, ncol=len(handles), loc="upper right", bbox_to_anchor=corner, fontsize=11)
    return figure


def _look(family: str) -> tuple[str, str]:
    """Return a family's colour and shape, whichever others are shown."""
    return _LOOKS[list(FAMILIES).index(family) % len(_LOOKS)]


def _title(way: tuple[str, str]) -> str:
    method, compensation = way
    name = titled(method)
    return name if compensation == "none" else f"{name} + {compensation.replace('_', ' ')}"


def _panel(axes: Axes, lines: Sequence[Line], ways: Sequence[tuple[str, str]], families: Sequence[str]) -> None:
    limits = _limits(lines)
    axes.set_xlim(*limits)
    axes.set_ylim(len(ways) - 0.5, -0.5)
    for place in range(0, len(ways), 2):
        axes.axhspan(place - 0.5, place + 0.5, color=PALETTE["band"], alpha=0.45, linewidth=0, zorder=0)
    axes.axvline(0, color=PALETTE["ink"], linewidth=1, zorder=1)
    step = _MARK / (_ROW + _MARK * len(families))
    for line in lines:
        colour, marker = _look(line.family)
        y = ways.index(line.way) + (families.index(line.family) - (len(families) - 1) / 2) * step
        if line.above_best > limits[1]:
            text = f"{line.above_best:.2f} \N{RIGHTWARDS ARROW}"
            axes.annotate(
                text,
                (limits[1], y),
                xytext=(-2, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                color=colour,
                fontsize=9,
            )
            continue
        reach = [[line.above_best - line.low], [line.high - line.above_best]]
        axes.errorbar(
            [line.above_best], [y], xerr=reach, fmt=marker, color=colour, markersize=5, capsize=0, elinewidth=1.4
        )
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
    axes.grid(axis="x", color=PALETTE["rule"], linewidth=0.8)
    axes.spines["left"].set_visible(False)
    axes.set_axisbelow(True)
    axes.set_xlabel("nats a token", labelpad=4)


def _limits(lines: Sequence[Line]) -> tuple[float, float]:
    """Return a scale on which most lines are apart, whatever the worst is."""
    middle = sorted(line.above_best for line in lines)[len(lines) // 2]
    inside = [line for line in lines if line.above_best <= _WORST * max(middle, 0.01)]
    low, high = min(0.0, *(line.low for line in inside)), max(line.high for line in inside)
    return low - 0.05 * (high - low), high + 0.05 * (high - low)
