"""The calibration study as one picture: which batch, how many averaged, how much text, of what length and kind."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from studies.calibration_study.summary import (
    Match,
    Rows,
    chance_of_selection,
    correlations,
    losses_of,
    matches,
    matching,
    perplexity,
)
from studies.picture import write_picture
from tasks.pictures.canvas import PALETTE, add_axes, new_canvas, write_text

WIDTH = 1040
_MARGIN, _TOP, _PANEL, _GAP, _BETWEEN = 16, 62, 250, 44, 112
_AXIS = 40  # pixels to the left of each panel for numbers
_BEST, _ANY, _PICK, _DOT = PALETTE["kept"], PALETTE["dense"], PALETTE["removed"], PALETTE["muted"]


def draw(rows: Rows, corpus: str, png: Path) -> list[Path]:
    """Draw every panel that there are plans for; write the picture as PNG and, beside it, as SVG.

    Args:
        rows: `studies.calibration_study.study.measure`'s.
        corpus: What the corpus is called.
        png: Where; the SVG takes the same name.
    """
    return write_picture(png, "calibration", lambda: _figure(rows, corpus))


def _figure(rows: Rows, corpus: str) -> Figure:
    pairs = matches(rows)
    figure = new_canvas(WIDTH, _TOP + 2 * _PANEL + _BETWEEN + 46)
    pool = matching(rows, part="candidate", calibrated_on=corpus, judged_on=corpus)
    ranked = correlations(rows, corpus)[corpus]
    first, second = _place(figure, 0, 0, 2), _place(figure, 0, 1, 2)
    told = f"Spearman {ranked.difference:.2f} [{ranked.low:.2f}, {ranked.high:.2f}]; {len(pool)} batches"
    _heading(
        figure, first[1], "Does KL choose the right batch?", f"perplexity against KL on the held-out batch; {told}"
    )
    _selection_panel(first[0], pool)
    measure = "perplexity against the number of candidates, chosen from or averaged"
    _heading(figure, second[1], "Pick one, or average?", measure)
    _averaging_panel(second[0], rows, pool)
    panels = 3 if pairs else 2
    third, fourth = _place(figure, 1, 0, panels), _place(figure, 1, 1, panels)
    length = pool[0]["length"]
    _heading(figure, third[1], "How much text?", f"perplexity against sequences of {length} tokens, ± 1 s.d.")
    _amount_panel(third[0], matching(rows, part="count"), "sequences")
    same = matching(rows, part="length")
    tokens = f"; {same[0]['sequences'] * same[0]['length']:,} tokens" if same else ""
    _heading(figure, fourth[1], "How long?", f"perplexity, ± 1 s.d.{tokens} in all")
    _amount_panel(fourth[0], same, "length")
    _same_scale(third[0], fourth[0])
    if pairs:
        fifth = _place(figure, 1, 2, panels)
        _heading(figure, fifth[1], "Of what kind?", "loss above the dense model, nats a token")
        _domain_panel(fifth[0], rows, pairs)
    return figure


def _place(figure: Figure, row: int, column: int, columns: int) -> tuple[Axes, tuple[float, float]]:
    """Return the axes of a panel, and where its heading is."""
    width = (WIDTH - 2 * _MARGIN - (columns - 1) * _GAP) / columns
    left, top = _MARGIN + column * (width + _GAP), _TOP + row * (_PANEL + _BETWEEN)
    return add_axes(figure, left + _AXIS, top, WIDTH - left - width, _PANEL), (left, top)


def _heading(figure: Figure, at: tuple[float, float], title: str, measure: str) -> None:
    write_text(figure, at[0], at[1] - 38, title, weight="bold")
    write_text(figure, at[0], at[1] - 20, measure, color=PALETTE["muted"], fontsize=11)


def _perplexities(rows: Rows) -> list[float]:
    return [perplexity(losses_of([row])) for row in rows]


def _selection_panel(axes: Axes, pool: Rows) -> None:
    scores, values = [row["kl_divergence"] for row in pool], _perplexities(pool)
    chosen, mean = int(np.argmin(scores)), perplexity(losses_of(pool))
    axes.axhline(mean, color=PALETTE["dense"], linewidth=1.2, dashes=(4, 3))
    axes.plot(scores, values, "o", markersize=7.5, color=_DOT, markeredgecolor=PALETTE["paper"])
    axes.plot(scores[chosen], values[chosen], "o", markersize=11, color=_BEST, markeredgecolor=PALETTE["paper"])
    note: dict[str, Any] = {"textcoords": "offset points", "fontsize": 11}
    axes.annotate("lowest KL", (scores[chosen], values[chosen]), (10, -4), color=_BEST, weight="bold", **note)
    axes.annotate("mean batch", (1, mean), (-2, 5), xycoords=("axes fraction", "data"), color=_DOT, ha="right", **note)
    axes.set_xlabel("KL(dense‖pruned), nats a token", labelpad=4)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.margins(0.06, 0.08)
    _finish(axes)


def _averaging_panel(axes: Axes, rows: Rows, pool: Rows) -> None:
    losses, scores = losses_of(pool), [row["kl_divergence"] for row in pool]
    sizes = np.arange(1, len(pool) + 1)
    picks = [perplexity(chance_of_selection(scores, int(size)) @ losses) for size in sizes]
    axes.plot(sizes, picks, color=_PICK, linewidth=1.8)
    drawn = [("lowest KL of so many, expected", _PICK, "")]
    any_ones, best = matching(rows, part="any"), matching(rows, part="best")
    if best:
        axes.plot([row["averaged"] for row in any_ones], _perplexities(any_ones), "o", color=_ANY, markersize=5)
        # of one: any candidate; of all of them: the best are any
        groups = {1: pool} | {k: matching(any_ones, averaged=k) for k in sorted({r["averaged"] for r in any_ones})}
        groups |= {len(pool): matching(best, averaged=len(pool))}
        means = {count: perplexity(losses_of(group)) for count, group in groups.items() if group}
        axes.plot(list(means), list(means.values()), color=_ANY, linewidth=1.8)
        drawn.append(("mean saliency of any so many", _ANY, "o"))
        counts = [1, *(row["averaged"] for row in best)]
        values = _perplexities([pool[int(np.argmin(scores))], *best])
        axes.plot(counts, values, "s-", color=_BEST, markersize=7, linewidth=2.2, markeredgecolor=PALETTE["paper"])
        drawn.append((f"mean saliency of the best so many of {len(pool)}", _BEST, "s"))
    _doubling(axes, sorted({1, *(row["averaged"] for row in [*best, *any_ones]), len(pool)}))
    axes.set_xlabel("candidates", labelpad=4)
    _finish(axes)
    handles = [Line2D([], [], color=c, marker=m, markersize=6, label=name) for name, c, m in drawn]
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.34 * (high - low))  # room for the legend
    axes.legend(handles=handles, loc="upper right", fontsize=11, handlelength=1.8)


def _amount_panel(axes: Axes, rows: Rows, by: str) -> None:
    if not rows:
        axes.set_axis_off()
        axes.text(0, 0.9, "not measured", transform=axes.transAxes, color=PALETTE["muted"], fontsize=11)
        return
    amounts = sorted({row[by] for row in rows})
    axes.plot([row[by] for row in rows], _perplexities(rows), "o", color=_ANY, markersize=5)
    means, below, above = [], [], []
    for amount in amounts:
        each = losses_of(matching(rows, **{by: amount})).mean(axis=1)
        deviation = float(each.std(ddof=1)) if len(each) > 1 else 0.0
        means.append(math.exp(each.mean()))
        below.append(means[-1] - math.exp(each.mean() - deviation))
        above.append(math.exp(each.mean() + deviation) - means[-1])
    look: dict[str, Any] = {"color": _BEST, "markersize": 7, "linewidth": 2, "capsize": 4}
    axes.errorbar(amounts, means, [below, above], fmt="s-", markeredgecolor=PALETTE["paper"], elinewidth=1.4, **look)
    _doubling(axes, amounts)
    axes.set_xlabel("sequences" if by == "sequences" else "tokens a sequence", labelpad=4)
    _finish(axes)


def _doubling(axes: Axes, ticks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(ticks[0] / 1.15, ticks[-1] * 1.15)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(tick) for tick in ticks])


def _same_scale(*panels: Axes) -> None:
    reach = [panel.get_ylim() for panel in panels if panel.axison]
    for panel in panels if reach else ():
        panel.set_ylim(min(low for low, _ in reach), max(high for _, high in reach))


def _domain_panel(axes: Axes, rows: Rows, pairs: Sequence[Match]) -> None:
    judges = list(dict.fromkeys(pair.judged_on for pair in pairs))
    colours = dict(zip(judges, (_BEST, _PICK), strict=False))
    for number, judge in enumerate(judges):
        dense = losses_of(matching(rows, part="dense", judged_on=judge)).mean()
        for place, pair in enumerate(each for each in pairs if each.judged_on == judge):
            colour = colours[pair.calibrated_on]
            members: list[Mapping[str, Any]] = matching(
                rows, part="candidate", calibrated_on=pair.calibrated_on, judged_on=judge
            )
            each = losses_of(members).mean(axis=1) - dense
            x = number + (place - 0.5) * 0.36
            spread = np.linspace(-0.07, 0.07, len(each)) if len(each) > 1 else [0.0]
            axes.plot(x + np.asarray(spread), each, "o", color=colour, alpha=0.4, markersize=5, markeredgewidth=0)
            axes.hlines(each.mean(), x - 0.13, x + 0.13, color=colour, linewidth=2.6)
    axes.set_xticks(range(len(judges)), [f"judged on {judge}" for judge in judges])
    axes.set_xlim(-0.5, len(judges) - 0.5)
    _finish(axes)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.24 * (high - low))  # room for the legend
    handles = [
        Line2D([], [], color=colour, linewidth=2.6, label=f"calibrated on {judge}") for judge, colour in colours.items()
    ]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.03, 1), fontsize=11, handlelength=1.4)


def _finish(axes: Axes) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y", color=PALETTE["rule"], linewidth=0.8)
    axes.set_axisbelow(True)
