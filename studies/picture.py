"""What every study's picture shares: how it is written, how methods look, and names where curves end."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nirvana.files import atomic_file
from tasks.pictures.canvas import PALETTE, styled, to_svg

DPI = 144
LINE = 15  # pixels from name to name
# ours and the paper's in the house colours; all rivals keep theirs whichever are shown
METHOD_LOOKS: dict[str, dict[str, Any]] = {
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
    "dense": {"color": PALETTE["ink"], "marker": "*"},
}
OTHER_LOOK: dict[str, Any] = {"color": PALETTE["muted"], "marker": "d"}
"""Of a method that is not among `METHOD_LOOKS`."""


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
