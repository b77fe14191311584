"""The report's figures: one plain function a figure, drawn with matplotlib, returned as SVG text.

Sizes are in pixels (one SVG unit each), so a figure drawn for a phone keeps the letter size of one drawn for a
desk. Text stays text: it is small, searchable and takes the page's font. Equal inputs give equal bytes.
"""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import MaxNLocator
from safetensors.numpy import load_file

from nirvana.errors import InputError
from nirvana.files import read_json
from nirvana.plan import Plan, PlannedSite
from tasks.pictures.canvas import PALETTE, add_axes, new_canvas, styled, to_svg, write_text

_NAMES = {"attention": "Attention", "mlp": "MLP", "kv_group": "KV groups", "mlp_neuron": "neurons"}
MOST_DOTS = 32  # units a layer drawn one by one; more are drawn as a distribution
MOST_BLOCKS = 12  # units a layer that a bar shows as blocks
FEWEST_SLOTS = 12  # layers that a panel has room for at least: two layers do not make two walls
WIDE = {"kept_share": 1040, "saliency": 1040, "kl_divergence": 660, "recovery": 660, "quality": 500, "cost": 500}
NARROW = 350  # pixels: a phone's page less its margins
COSTS = {  # key in benchmark.json -> what it is, and its kind
    "parameters": ("Parameters", "count"),
    "checkpoint_bytes": ("Checkpoint", "bytes"),
    "flops_per_token": ("FLOPs a token", "count"),
    "prefill_latency_ms": ("Prefill latency", "ms"),
    "decode_latency_ms": ("Decode latency a token", "ms"),
    "peak_bytes": ("Peak memory", "bytes"),
    "prefill_tokens_per_second": ("Prefill speed", "tokens/s"),
    "decode_tokens_per_second": ("Decode speed", "tokens/s"),
}
_PREFIXES = {"count": ("", "k", "M", "B", "T"), "bytes": ("B", "kB", "MB", "GB", "TB")}
_SPACE = "\N{NO-BREAK SPACE}"


def title_of(name: str) -> str:
    """Return how a module or a unit is written for a reader; unknown names keep their own words."""
    return _NAMES.get(name, name.replace("_", " "))


def written(value: float, kind: str = "", digits: int = 4) -> str:
    """Write a number with its unit, to `digits` significant digits; `share` is written in percent."""
    if kind == "share":
        return f"{100 * value:.1f}{_SPACE}%"
    if kind in _PREFIXES:
        power = min(4, max(0, (len(str(int(abs(value)))) - 1) // 3))
        value, kind = value / 1000**power, _PREFIXES[kind][power]
    decimals = digits if value == 0 else max(0, digits - 1 - math.floor(math.log10(abs(value))))
    if value == int(value) and decimals <= digits:
        decimals = 0
    return f"{value:,.{decimals}f}{_SPACE}{kind}".rstrip(_SPACE)


def is_share(metric: str, *values: float) -> bool:
    """Tell whether a task's metric is a share of items (accuracy and its like), not a perplexity."""
    unbounded = any(word in metric for word in ("perplexity", "ppl", "bits", "loss"))
    return not unbounded and all(0 <= value <= 1 for value in values)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a CSV file that has a header."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def by_module(rows: Sequence[Mapping[str, str]]) -> dict[str, list[Mapping[str, str]]]:
    """Group the rows of allocation.csv by their module, keeping their order."""
    return {name: [r for r in rows if r["module"] == name] for name in dict.fromkeys(r["module"] for r in rows)}


def _layer_panel(figure: Figure, top: float, height: float, layers: int) -> Axes:
    left, width = 40, figure.get_size_inches()[0] * 72
    return add_axes(figure, left, top, (width - left) * max(0, 1 - layers / FEWEST_SLOTS), height)


def _layer_axis(axes: Axes, layers: Sequence[str], labelled: bool) -> None:
    """Put layers on x, as many numbers as fit."""
    room = axes.get_window_extent().width / axes.figure.dpi * 72
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, len(layers)) if len(layers) / s * 24 <= room)
    shown = range(0, len(layers), step)
    axes.set_xticks(list(shown), [layers[i] for i in shown] if labelled else [""] * len(shown))
    axes.set_xlim(-0.6, len(layers) - 0.4)
    if labelled:
        axes.set_xlabel("layer", labelpad=4)


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    figure.legend(handles=handles, ncol=len(handles), loc="upper left", bbox_to_anchor=(0, 1))


def _kept_and_removed() -> list[Patch]:
    return [Patch(color=PALETTE["kept"], label="kept"), Patch(color=PALETTE["removed"], label="removed")]


# --- 1. what stays --------------------------------------------------------------------------------------------


def kept_share(allocation: Sequence[Mapping[str, str]], width: int) -> Figure:
    """Draw the share of units that each layer keeps, one panel a module, layers on x."""
    modules = by_module(allocation)
    panel = 120
    figure = new_canvas(width, 34 + len(modules) * (panel + 44) + 24)
    for number, (module, rows) in enumerate(modules.items()):
        top = 34 + number * (panel + 44) + 24
        weights = sum(int(r["weights"]) for r in rows)
        average = sum(int(r["kept_weights"]) for r in rows) / weights
        write_text(figure, 0, top - 13, title_of(module), weight="bold")
        kept = f"{written(average, 'share')} of its weights kept"
        write_text(figure, width, top - 13, kept, ha="right", color=PALETTE["muted"])
        axes = _layer_panel(figure, top, panel, len(rows))
        x = np.arange(len(rows))
        share = np.array([float(r["kept_share"]) for r in rows])
        axes.bar(x, share, width=0.78, color=PALETTE["kept"], linewidth=0)
        axes.bar(x, 1 - share, bottom=share, width=0.78, color=PALETTE["removed"], linewidth=0)
        units = max(int(r["units"]) for r in rows)
        if units <= MOST_BLOCKS:
            axes.hlines(np.arange(1, units) / units, -0.5, len(rows) - 0.5, color=PALETTE["paper"], linewidth=1.5)
        axes.axhline(average, color=PALETTE["ink"], linewidth=1.2, dashes=(4, 3))
        axes.set_ylim(0, 1)
        axes.set_yticks([0, 0.5, 1], ["0", "50", f"100{_SPACE}%"])
        _layer_axis(axes, [r["layer"] for r in rows], labelled=number == len(modules) - 1)
    average_line = Line2D([], [], color=PALETTE["ink"], linewidth=1.2, dashes=(3, 2), label="average")
    _legend(figure, [*_kept_and_removed(), average_line])
    return figure


# --- 2. why it stays ------------------------------------------------------------------------------------------


def saliency(sites: Sequence[PlannedSite], scores: Mapping[str, np.ndarray], width: int) -> Figure:
    """Draw unit saliency a layer on a log scale (a plain one where scores have signs), kept against removed."""
    modules = list(dict.fromkeys(site.module for site in sites))
    panel = 200
    figure = new_canvas(width, 34 + len(modules) * (panel + 44) + 24)
    for number, module in enumerate(modules):
        members = [site for site in sites if site.module == module]
        top = 34 + number * (panel + 44) + 24
        units = sorted({site.units for site in members})
        count = f"{units[0]:,}" if len(units) == 1 else f"{units[0]:,} to {units[-1]:,}"
        unit = title_of(members[0].name.rpartition(".")[2])
        write_text(figure, 0, top - 13, title_of(module), weight="bold")
        write_text(figure, width, top - 13, f"{count} {unit} a layer", ha="right", color=PALETTE["muted"])
        axes = _layer_panel(figure, top, panel, len(members))
        values = [np.asarray(scores[site.name], dtype=np.float64) for site in members]
        every = np.concatenate(values)
        signed = bool((every < 0).any())  # standardised scores, as FLAP's
        positive = every[every > 0]
        low, high = (positive.min(), positive.max()) if positive.size else (1.0, 10.0)
        # a zero has no place on a log scale: it sits on the lower edge
        logs = values if signed else [np.log10(np.maximum(v, low)) for v in values]
        masks = [np.isin(np.arange(site.units), site.keep_indices) for site in members]
        (_dots if units[-1] <= MOST_DOTS else _violins)(axes, logs, masks)
        bottom, top_value = (every.min(), every.max()) if signed else (math.log10(low), math.log10(high))
        margin = 0.04 * (top_value - bottom) + 0.02
        axes.set_ylim(bottom - margin, top_value + margin)
        (_plain_ticks if signed else _log_ticks)(axes)
        _layer_axis(axes, [str(site.layer) for site in members], labelled=number == len(modules) - 1)
    _legend(figure, _kept_and_removed())
    return figure


def _dots(axes: Axes, logs: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> None:
    size = 7 if max(map(len, logs)) <= MOST_BLOCKS else 4.5
    for keep, marker in ((True, "o"), (False, "X")):
        x = np.concatenate([np.full(int((m == keep).sum()), i) for i, m in enumerate(masks)])
        y = np.concatenate([v[m == keep] for v, m in zip(logs, masks, strict=True)])
        colour = PALETTE["kept" if keep else "removed"]
        axes.plot(x, y, marker, markersize=size, color=colour, markeredgecolor=PALETTE["paper"])


def _violins(axes: Axes, logs: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> None:
    """Draw one histogram a layer, upright and mirrored; a bin with both kinds is cut in height by their counts."""
    every = np.concatenate(logs)
    bins = int(np.clip(max(map(len, logs)) // 16, 12, 48))
    edges = np.linspace(every.min(), every.max() + 1e-9, bins + 1)
    outlines: dict[str, list[Outline]] = {"kept": [], "removed": []}
    for layer, (values, mask) in enumerate(zip(logs, masks, strict=True)):
        total = np.histogram(values, edges)[0]
        removed = np.histogram(values[~mask], edges)[0]
        half = 0.46 * total / max(total.max(), 1)
        cut = edges[:-1] + np.diff(edges) * removed / np.maximum(total, 1)
        both = np.flatnonzero((removed > 0) & (removed < total))
        for kind, alone, bottom, top in (
            ("removed", (removed == total) & (total > 0), edges[:-1], cut),
            ("kept", (removed == 0) & (total > 0), cut, edges[1:]),
        ):
            for run in [*_runs(alone), *(slice(i, i + 1) for i in both)]:
                height = np.column_stack([bottom[run], top[run]]).ravel()
                right = layer + np.repeat(half[run], 2)
                x = np.concatenate([right, 2 * layer - right[::-1]])
                corners = np.column_stack([x, np.concatenate([height, height[::-1]])])
                outlines[kind].append(Outline(corners, closed=False))
    for kind, parts in outlines.items():
        if not parts:
            continue
        compound = Outline.make_compound_path(*parts)
        axes.add_patch(PathPatch(compound, facecolor=PALETTE[kind], linewidth=0))


def _runs(mask: np.ndarray) -> list[slice]:
    """Return the stretches where `mask` holds."""
    steps = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return [slice(int(start), int(stop)) for start, stop in zip(steps[::2], steps[1::2], strict=True)]


def _log_ticks(axes: Axes) -> None:
    """Label an axis of decimal logarithms: by powers of ten, or by plain numbers where it spans fewer than two."""
    low, high = axes.get_ylim()
    exponents = range(math.ceil(low), math.floor(high) + 1)
    if len(exponents) < 2:
        values = [v for v in MaxNLocator(4).tick_values(10**low, 10**high) if 10**low <= v <= 10**high]
        axes.set_yticks([math.log10(v) for v in values], [f"{v:.3g}" for v in values])
    else:
        superscript = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
        shown = exponents[:: math.ceil(len(exponents) / 5)]
        axes.set_yticks(list(shown), [f"10{str(e).translate(superscript)}" for e in shown])
    _rules(axes)


def _plain_ticks(axes: Axes) -> None:
    low, high = axes.get_ylim()
    values = [v for v in MaxNLocator(4).tick_values(low, high) if low <= v <= high]
    axes.set_yticks(values, [f"{v:.3g}" for v in values])
    _rules(axes)


def _rules(axes: Axes) -> None:
    axes.grid(axis="y", color=PALETTE["rule"], linewidth=0.8)
    axes.set_axisbelow(True)


# --- 3. which calibration set ---------------------------------------------------------------------------------


def kl_divergence(selection: Mapping[str, Any], width: int) -> Figure:
    """Draw each candidate's KL divergence, the pool's mean ± standard deviation, and the winner."""
    scores = np.array(selection["scores"], dtype=np.float64)
    winner = selection["selected"]
    figure = new_canvas(width, 290)
    write_text(figure, 0, 45, "KL divergence", weight="bold")
    write_text(figure, width, 45, "nats a token, lower is better", ha="right", color=PALETTE["muted"])
    axes = add_axes(figure, 48, 58, 0, 184)
    x = np.arange(len(scores))
    handles: list[Any] = []
    reach = list(scores)
    if len(scores) > 1:
        mean, deviation = selection["mean"], selection["standard_deviation"]
        reach += [mean - deviation, mean + deviation]
        axes.axhspan(mean - deviation, mean + deviation, color=PALETTE["band"], linewidth=0)
        line = axes.axhline(mean, color=PALETTE["muted"], linewidth=1.2, label="mean")
        handles = [line, Patch(color=PALETTE["band"], label="± 1 standard deviation")]
        others = x != winner
        axes.plot(x[others], scores[others], "o", markersize=8, color=PALETTE["dense"])
    axes.plot(winner, scores[winner], "o", markersize=12, color=PALETTE["kept"])
    margin = max((max(reach) - min(reach)) * 0.22, abs(scores[winner]) * 0.002, 1e-9)
    axes.set_ylim(min(reach) - margin, max(reach) + margin)
    last = winner > len(scores) * 0.7
    axes.annotate(
        written(scores[winner]),
        (winner, scores[winner]),
        xytext=(-12 if last else 12, 0),
        textcoords="offset points",
        ha="right" if last else "left",
        va="center_baseline",
        weight="bold",
        color=PALETTE["kept"],
    )
    axes.yaxis.set_major_locator(MaxNLocator(4))
    _layer_axis(axes, [str(i) for i in x], labelled=True)
    axes.set_xlabel("candidate", labelpad=4)
    dot = Line2D([], [], color=PALETTE["kept"], marker="o", markersize=9, linestyle="", label="chosen")
    _legend(figure, [dot, *handles])
    return figure


# --- 4. what fine-tuning gives back ---------------------------------------------------------------------------


def recovery(summary: Mapping[str, Any], curve: Sequence[Mapping[str, str]], width: int) -> Figure:
    """Draw held-out loss against tokens of fine-tuning, from the pruned model towards the dense one's level."""
    tokens, losses = ([float(row[key]) for row in curve] for key in ("tokens", "heldout_loss"))
    dense = summary["heldout_loss"]["dense"]
    figure = new_canvas(width, 290)
    write_text(figure, 0, 45, "Held-out loss", weight="bold")
    write_text(figure, width, 45, "nats a token, lower is better", ha="right", color=PALETTE["muted"])
    axes = add_axes(figure, 48, 58, 16, 184)
    level = axes.axhline(dense, color=PALETTE["dense"], linewidth=2, label="dense")
    (line,) = axes.plot(
        tokens, losses, "o-", markersize=5, color=PALETTE["kept"], label="pruned, while it is fine-tuned"
    )
    margin = max((max(losses) - dense) * 0.12, 1e-6)
    axes.set_ylim(min([dense, *losses]) - margin, max([dense, *losses]) + margin)
    axes.annotate(
        written(losses[-1]),
        (tokens[-1], losses[-1]),
        xytext=(0, 9),
        textcoords="offset points",
        ha="right",
        weight="bold",
        color=PALETTE["kept"],
    )
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: written(value, "count", 3))
    axes.set_xlim(-0.01 * tokens[-1], tokens[-1] * 1.02)
    axes.set_xlabel("tokens of fine-tuning", labelpad=4)
    _legend(figure, [line, level])
    return figure


# --- 5. dense beside pruned -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """One quantity, dense beside pruned: values, how they are written, and what surrounds them."""

    label: str
    dense: float
    pruned: float
    dense_text: str
    pruned_text: str
    note: str = ""
    scale: float | None = None  # the value of a full-length bar; None: the larger of the two
    errors: tuple[float, float] | None = None  # standard errors, dense and pruned
    floor: float | None = None  # the least share of the dense value that could be reached


def pairs(rows: Sequence[Pair], width: int) -> Figure:
    """Draw two bars a quantity, each quantity on its own scale from zero, values written out."""
    figure = new_canvas(width, 30 + 58 * len(rows))
    room = 76  # pixels kept free for the value behind the longest bar
    for number, row in enumerate(rows):
        top = 30 + 58 * number
        write_text(figure, 0, top + 12, row.label, weight="bold")
        write_text(figure, width, top + 12, row.note, ha="right", color=PALETTE["muted"])
        axes = add_axes(figure, 0, top + 18, 0, 30)
        axes.set_axis_off()
        scale = (row.scale or max(row.dense, row.pruned) or 1.0) * width / (width - room)
        axes.set_xlim(0, scale)
        axes.set_ylim(2, 0)
        values = ((0.5, row.dense, row.dense_text, "dense"), (1.5, row.pruned, row.pruned_text, "kept"))
        for index, (y, value, text, colour) in enumerate(values):
            axes.barh(y, value, height=0.8, color=PALETTE[colour], linewidth=0)
            reach = value
            if row.errors:
                error = row.errors[index]
                axes.errorbar(value, y, xerr=error, color=PALETTE["ink"], linewidth=1.2, capsize=3, capthick=1.2)
                reach += error
            axes.annotate(text, (reach, y), xytext=(6, 0), textcoords="offset points", va="center_baseline")
        if row.floor is not None:
            axes.vlines(row.floor * row.dense, 0.98, 2.02, color=PALETTE["ink"], linewidth=2, clip_on=False)
    handles: list[Any] = [Patch(color=PALETTE["dense"], label="dense"), Patch(color=PALETTE["kept"], label="pruned")]
    if any(row.errors for row in rows):
        handles.append(Line2D([], [], color=PALETTE["ink"], linewidth=1.2, label="± 1 standard error"))
    if any(row.floor is not None for row in rows):
        ink = PALETTE["ink"]
        handles.append(Line2D([], [], color=ink, label="floor", marker="|", ms=11, mew=2, linestyle=""))
    _legend(figure, handles)
    return figure


def quality_pairs(dense: Mapping[str, Any], pruned: Mapping[str, Any]) -> list[Pair]:
    """Pair the two evaluations: token perplexity, then every task that both have."""
    before, after = dense["token_perplexity"], pruned["token_perplexity"]
    rows = [
        Pair(
            "Token perplexity",
            before,
            after,
            written(before),
            written(after),
            f"×{after / before:.2f} · lower is better",
        )
    ]
    for name in [name for name in dense["tasks"] if name in pruned["tasks"]]:
        old, new = dense["tasks"][name], pruned["tasks"][name]
        before, after, metric = old["value"], new["value"], old["metric"]
        share = is_share(metric, before, after)
        kind = "share" if share else ""
        note = f"×{after / before:.2f}" if before else ""
        if share:
            note = f"{100 * (after - before):+.1f} points".replace("-", "−")
        elif "perplexity" in metric:
            note += " · lower is better"
        errors = [task.get("stderr") for task in (old, new)]
        rows.append(
            Pair(
                f"{name}, {metric}",
                before,
                after,
                written(before, kind),
                written(after, kind),
                note,
                scale=1.0 if share else None,
                errors=None if None in errors else (errors[0], errors[1]),
            )
        )
    return rows


def cost_pairs(benchmark: Mapping[str, Any]) -> list[Pair]:
    """Pair what smaller is better in: size, arithmetic, latency, memory; with the floor where there is one."""
    floors = {f"{phase}_latency_ms": value for phase, value in benchmark["floor"].items()}
    rows = []
    for key, (label, kind) in COSTS.items():
        before, after = benchmark["dense"].get(key), benchmark["pruned"].get(key)
        if before is None or after is None or kind == "tokens/s":  # speeds repeat the latencies
            continue
        note, floor = f"×{after / before:.2f}", floors.get(key)
        if floor is not None:
            note += f" · floor ×{floor:.2f}"
        rows.append(Pair(label, before, after, written(before, kind), written(after, kind), note, floor=floor))
    return rows


# --- all of them ----------------------------------------------------------------------------------------------


def figures(inputs: Mapping[str, Path], narrow: bool = False) -> dict[str, str]:
    """Draw every figure whose files are among `inputs`.

    Args:
        inputs: Paths by name, as the report step gets them; a figure whose files are absent is left out, and so is
            the learning curve of a model that was not fine-tuned.
        narrow: Draw for a phone's width instead of a desk's.

    Returns:
        SVG text by figure name, in the report's order.

    Raises:
        InputError: If the unit saliency does not fit the plan.
    """
    recipes: dict[str, tuple[tuple[str, ...], Callable[[int], Figure]]] = {
        "kept_share": (("allocation",), lambda w: kept_share(read_rows(inputs["allocation"]), w)),
        "saliency": (
            ("plan", "selection", "unit_saliency"),
            lambda w: saliency(*sites_and_saliency(*(inputs[i] for i in recipes["saliency"][0])), w),
        ),
        "kl_divergence": (("selection",), lambda w: kl_divergence(read_json(inputs["selection"]), w)),
        "recovery": (
            ("recovery", "recovery_curve"),
            lambda w: recovery(read_json(inputs["recovery"]), read_rows(inputs["recovery_curve"]), w),
        ),
        "quality": (
            ("evaluation_dense", "evaluation"),
            lambda w: pairs(quality_pairs(*(read_json(inputs[i]) for i in recipes["quality"][0])), w),
        ),
        "cost": (("benchmark",), lambda w: pairs(cost_pairs(read_json(inputs["benchmark"])), w)),
    }
    if "recovery" in inputs and not read_json(inputs["recovery"])["tokens"]:
        del recipes["recovery"]  # nothing was asked for
    drawn = {}
    with styled():
        for name, (files, draw) in recipes.items():
            if all(file in inputs for file in files):
                prefix = f"{name}-{'narrow' if narrow else 'wide'}".replace("_", "-")
                drawn[name] = to_svg(draw(NARROW if narrow else WIDE[name]), prefix)
    return drawn


def sites_and_saliency(
    plan: Path, selection: Path, unit_saliency: Path
) -> tuple[tuple[PlannedSite, ...], dict[str, np.ndarray]]:
    """Read the plan's sites and the chosen candidate's unit saliency, one vector a site."""
    sites = Plan.read(plan).sites
    file = unit_saliency / f"candidate_{read_json(selection)['selected']:03d}.safetensors"
    if not file.is_file():
        raise InputError(f"{file}: expected the winner's unit saliency, found nothing; run aggregate_saliency")
    scores = load_file(file)
    for site in sites:
        found = scores[site.name].size if site.name in scores else 0
        if found != site.units:
            raise InputError(
                f"{file.name}: expected {site.units} units at {site.name}, found {found}; "
                "the plan belongs to other scores: run allocate"
            )
    return sites, scores
