"""A canvas in pixels for every figure: colours, style, axes, text and SVG that is the same for equal inputs."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Blue and vermilion stay apart in every common form of colour blindness, and in grey.
PALETTE = {
    "ink": "#1d2227",
    "muted": "#5b6570",
    "rule": "#d3d8dd",
    "band": "#e6eaee",
    "dense": "#98a2ac",
    "kept": "#1266a8",
    "removed": "#dc7b36",
    "paper": "#fefefe",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nirvana",
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same letter widths everywhere
    "font.size": 12,
    "text.parse_math": False,  # a task's name may hold a dollar sign
    "text.color": PALETTE["ink"],
    "axes.edgecolor": PALETTE["rule"],
    "axes.facecolor": "none",
    "axes.labelcolor": PALETTE["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 1,
    "xtick.color": PALETTE["rule"],
    "ytick.color": PALETTE["rule"],
    "xtick.labelcolor": PALETTE["muted"],
    "ytick.labelcolor": PALETTE["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.handlelength": 1.0,
    "legend.handleheight": 0.9,
    "legend.columnspacing": 1.4,
    "legend.borderaxespad": 0,
    "legend.borderpad": 0,
}


@contextmanager
def styled() -> Iterator[None]:
    """Draw in our style: a user's matplotlibrc must not change the bytes."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def new_canvas(width: float, height: float) -> Figure:
    """Return an empty figure of so many pixels."""
    return Figure(figsize=(width / 72, height / 72), facecolor=PALETTE["paper"])


def add_axes(figure: Figure, left: float, top: float, right: float, height: float) -> Axes:
    """Add axes by pixel: margins to the left, to the top of the figure and to the right, and a height."""
    width, total = figure.get_size_inches() * 72
    return figure.add_axes((left / width, 1 - (top + height) / total, (width - left - right) / width, height / total))


def write_text(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """Write text with its baseline `y` pixels below the top of the figure."""
    width, total = figure.get_size_inches() * 72
    figure.text(x / width, 1 - y / total, text, va="baseline", **style)


def to_svg(figure: Figure, name: str) -> str:
    """Render, dropping what a browser does not need and making ids unique to this figure."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"\s*<style type=\"text/css\">.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'd="[^"]*"', _rounded, text)
    text = re.sub(r'(width|height)="([\d.]+)pt"', r'\1="\2"', text, count=2)
    used = set(re.findall(r'(?:href="#|url\(#)([\w-]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = text.replace("'DejaVu Sans'", "'DejaVu Sans', Arial, sans-serif")
    return text.replace("<svg ", '<svg stroke-linejoin="round" ', 1)


def _rounded(path: re.Match[str]) -> str:
    """Write a path's coordinates to a hundredth of a pixel: an eighth of the file's size goes unseen."""
    numbers = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), path[0])
    return numbers.replace(" \n", " ").replace("\n", " ")
