"""The kernel study as one picture: how far the kernel moves, and what fine-tuning makes of it."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from studies.ntk.summary import Rows, by_seed, ratios_of, spread
from studies.picture import write_picture
from tasks.pictures.canvas import PALETTE, add_axes, new_canvas, write_text

WIDTH, HEIGHT = 1040, 372
_MARGIN, _TOP, _PANEL, _GAP = 16, 92, 230, 56
# shape and colour both tell the methods apart, and grey keeps them apart in print
_LOOK: dict[str, dict[str, Any]] = {
    "nirvana": {"color": PALETTE["kept"], "marker": "o", "label": "NIRVANA"},
    "magnitude": {"color": PALETTE["removed"], "marker": "s", "label": "magnitude"},
    "random": {"color": PALETTE["dense"], "marker": "^", "label": "random"},
}
_ASIDE = {"nirvana": 0.0, "magnitude": -0.006, "random": 0.006}  # so that no error bar hides another


def draw(kernels: Rows, curves: Rows, ratio: float, png: Path) -> list[Path]:
    """Draw both panels; write the picture as PNG and, beside it, as SVG.

    Args:
        kernels: Rows of kernel changes.
        curves: Fine-tuning curves.
        ratio: The ratio that the fine-tuned models were pruned at.
        png: Where; the SVG takes the same name.
    """
    return write_picture(png, "ntk", lambda: _figure(kernels, curves, ratio))


def _figure(kernels: Rows, curves: Rows, ratio: float) -> Figure:
    figure = new_canvas(WIDTH, HEIGHT)
    width = (WIDTH - 2 * _MARGIN - _GAP) / 2
    right = _MARGIN + width + _GAP
    _heading(figure, _MARGIN, "How far pruning moves the SignGD kernel", "‖K pruned − K dense‖ / ‖K dense‖")
    _kernel_panel(add_axes(figure, _MARGIN + 34, _TOP, WIDTH - _MARGIN - width, _PANEL), kernels)
    _heading(
        figure,
        right,
        f"What pruning {ratio:.0%} costs while fine-tuning goes on",
        "held-out loss above the dense model's, tuned alike; nats a token",
    )
    _curve_panel(add_axes(figure, right + 34, _TOP, _MARGIN, _PANEL), curves)
    seeds = len({row["seed"] for row in kernels})
    deviation = Line2D([], [], color=PALETTE["muted"], marker="|", markersize=11, linestyle="")
    deviation.set_label(f"bars and bands: ± 1 standard deviation over {seeds} models")
    handles = [*(Line2D([], [], markersize=6, **look) for look in _LOOK.values()), deviation]
    corner = (_MARGIN / WIDTH, 1 - 12 / HEIGHT)
    figure.legend(handles=handles, ncol=len(handles), loc="upper left", bbox_to_anchor=corner, handlelength=1.8)
    return figure


def _heading(figure: Figure, x: float, title: str, measure: str) -> None:
    write_text(figure, x, 62, title, weight="bold")
    write_text(figure, x, 80, measure, color=PALETTE["muted"])


def _kernel_panel(axes: Axes, kernels: Rows) -> None:
    ratios = ratios_of(kernels)
    for method, look in _LOOK.items():
        spreads = [spread(by_seed(kernels, "relative_change", method=method, ratio=ratio)) for ratio in ratios]
        means, deviations = zip(*spreads, strict=True)
        x = np.array(ratios) + _ASIDE[method]
        axes.errorbar(x, means, deviations, capsize=3, markersize=6, **look)
    axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axes.set_xlabel("pruning ratio", labelpad=4)
    _finish(axes)


def _curve_panel(axes: Axes, curves: Rows) -> None:
    steps = curves[0]["steps"]
    losses = {
        method: np.array([row["losses"] for row in curves if row["method"] == method]) for method in ("dense", *_LOOK)
    }
    for method, look in _LOOK.items():
        # within each model: what all methods share of a model is no news about them
        excess = losses[method] - losses["dense"]
        means, deviations = np.array([spread(column) for column in excess.T]).T
        axes.fill_between(steps, means - deviations, means + deviations, color=look["color"], alpha=0.2, linewidth=0)
        axes.plot(steps, means, markersize=4.5, **look)
    axes.set_xlabel("AdamW steps", labelpad=4)
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=PALETTE["rule"], linewidth=0.8)
    axes.set_axisbelow(True)
