"""The fine-tuning study as one picture: learning curves, and what is left of a lead once all have learnt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from studies.comparison import DENSE
from studies.fine_tuning.summary import Dense, Line, called, is_reference
from studies.picture import METHOD_LOOKS, OTHER_LOOK, End, name_ends, write_picture
from tasks.pictures.canvas import PALETTE, add_axes, new_canvas, write_text

WIDTH = 1040
_MARGIN, _TOP, _PANEL, _AXIS = 16, 62, 330, 34
_ROOM = 138  # pixels to the right of the first panel, for names
_FIRST = 596  # where the second begins
_NAMES = 128  # pixels to its left, for names
_STEPS = (1, 2, 5, 10)  # between ticks


def draw(dense: Dense, lines: Sequence[Line], reference: tuple[str, str], png: Path) -> list[Path]:
    """Draw both panels; write the picture as PNG and, beside it, as SVG.

    Args:
        dense: The dense model's losses: a line in the first panel.
        lines: One a model.
        reference: Method and compensation that the others are compared with.
        png: Where; the SVG takes the same name.
    """
    return write_picture(png, "fine-tuning", lambda: _figure(dense, lines, reference))


def _figure(dense: Dense, lines: Sequence[Line], reference: tuple[str, str]) -> Figure:
    height = _TOP + _PANEL + 78
    figure = new_canvas(WIDTH, height)
    muted: dict[str, Any] = {"color": PALETTE["muted"], "fontsize": 11}
    ours = next(line for line in lines if is_reference(line, reference))
    write_text(figure, _MARGIN, 24, f"Learning curves at ratio {ours.ratio:g}", weight="bold")
    write_text(figure, _MARGIN, 42, "held-out loss, nats a token; lower is better", **muted)
    _curves(add_axes(figure, _MARGIN + _AXIS, _TOP, WIDTH - _FIRST + _ROOM, _PANEL), dense, lines, reference)
    write_text(figure, _FIRST, 24, f"Behind {called(ours)}, before and after", weight="bold")
    write_text(figure, _FIRST, 42, "loss above it on the evaluation text, nats a token; 95 % over windows", **muted)
    others = sorted((line for line in lines if line is not ours), key=lambda line: line.above_after.difference)
    if not others:
        write_text(figure, _FIRST, 80, "no other model was trained", **muted)
        return figure
    _leads(add_axes(figure, _FIRST + _NAMES, _TOP, _MARGIN, _PANEL), others)
    handles = [_handle(label, fill) for label, fill in (("before", PALETTE["paper"]), ("after", PALETTE["muted"]))]
    corner = ((_FIRST + _NAMES) / WIDTH, 12 / height)
    figure.legend(handles=handles, ncol=2, loc="lower left", bbox_to_anchor=corner, fontsize=11)
    return figure


def _handle(label: str, fill: str) -> Line2D:
    muted = PALETTE["muted"]
    return Line2D([], [], marker="o", linestyle="", markersize=7, color=muted, markerfacecolor=fill, label=label)


def _look(line: Line, lines: Sequence[Line]) -> dict[str, Any]:
    """Return a method's colour and marker; dashes tell the model as selected from the compensated one beside it."""
    both = line.compensation == "none" and any(x.method == line.method and x is not line for x in lines)
    return {
        "linewidth": 1.5,
        "zorder": 3,
        **METHOD_LOOKS.get(line.method, OTHER_LOOK),
        "linestyle": "--" if both else "-",
    }


def _curves(axes: Axes, dense: Dense, lines: Sequence[Line], reference: tuple[str, str]) -> None:
    losses = [loss for line in lines for _, _, loss in line.curve]
    low, high = min(*losses, dense.heldout), max(losses)
    limits = (low - 0.06 * (high - low), high + 0.06 * (high - low))
    axes.set_ylim(*limits)
    most = max(line.tokens for line in lines)
    axes.set_xlim(0, most * 1.02)
    axes.axhline(dense.heldout, color=PALETTE["dense"], linewidth=2, zorder=1)
    labels = [(DENSE, dense.heldout, PALETTE["muted"], "normal")]
    for line in lines:
        look, bold = _look(line, lines), is_reference(line, reference)
        tokens, _, curve = zip(*line.curve, strict=True)
        axes.plot(tokens, curve, markersize=5, clip_on=False, **look)
        labels.append((called(line), curve[-1], look["color"], "bold" if bold else "normal"))
    ends = [End(name, (value - limits[0]) / (limits[1] - limits[0]) * _PANEL, *look) for name, value, *look in labels]
    name_ends(axes, ends, _PANEL, 14)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=_STEPS))
    axes.set_xlabel("tokens trained on", labelpad=4)
    axes.grid(axis="y", color=PALETTE["rule"], linewidth=0.8)
    axes.set_axisbelow(True)


def _leads(axes: Axes, others: Sequence[Line]) -> None:
    axes.axvline(0, color=PALETTE["ink"], linewidth=1)
    places = range(len(others), 0, -1)
    for line, place in zip(others, places, strict=True):
        color = _look(line, others)["color"]
        ends = [line.above_before.difference, line.above_after.difference]
        axes.plot(ends, [place + 0.13, place - 0.13], color=color, linewidth=0.8, alpha=0.5, zorder=1)
        for interval, shift, fill in ((line.above_before, 0.13, PALETTE["paper"]), (line.above_after, -0.13, color)):
            reach = [[interval.difference - interval.low], [interval.high - interval.difference]]
            axes.errorbar(
                [interval.difference],
                [place + shift],
                xerr=reach,
                fmt="o",
                color=color,
                markerfacecolor=fill,
                markersize=7,
                capsize=3,
            )
    axes.set_yticks(list(places), [called(line) for line in others], fontsize=11)
    axes.set_ylim(0.4, len(others) + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, -0.1 * (right - left)), max(right, 0.1 * (right - left)))
    axes.set_xlabel("above 0: worse", labelpad=4)
    axes.grid(axis="x", color=PALETTE["rule"], linewidth=0.8)
    axes.spines["left"].set_visible(False)
    axes.set_axisbelow(True)
