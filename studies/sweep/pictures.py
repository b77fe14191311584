"""The sweeps as pictures: quality against gamma, the attention factor, the rounding, and by where weights leave."""

from collections.abc import Callable, Sequence
from pathlib import Path

from studies.sweep import alignment, attention_factor, gamma_sweep, modules
from studies.sweep.alignment import PHASES
from studies.sweep.cells import Cell
from studies.sweep.plot import Curve, Level, Panel, Spot, draw, kl_spot, perplexity_spot

_KL, _PERPLEXITY = "KL from the dense model, nats a token", "token perplexity, log scale"
_BARS = "bars: 95 % paired interval of the difference to"


def draw_gamma(cells: Sequence[Cell], dense_perplexity: float, png: Path) -> list[Path]:
    """Draw KL and perplexity against gamma, one curve a ratio, the joint ranking as a level."""
    ratios = gamma_sweep.ratios_of(cells)
    gammas = sorted({each.names["gamma"] for each in cells if each.names["gamma"] is not None})
    published = gamma_sweep.PUBLISHED
    panels = []
    for title, measure, spot_of, value in (
        ("Held-out KL", f"{_KL}, log scale", kl_spot, "kl_divergence"),
        ("Perplexity on other text", _PERPLEXITY, perplexity_spot, "token_perplexity"),
    ):
        curves, levels = [], []
        for look, ratio in enumerate(ratios):
            reached = [each for each in gamma_sweep.swept_at(cells, ratio) if each.judged]
            spots = [spot_of(each, each.names["gamma"], bool(each.more.get("capped"))) for each in reached]
            curves.append(Curve(f"ratio {ratio:g}", spots, look))
            joint = gamma_sweep.joint_at(cells, ratio)
            if joint is not None:
                levels.append(Level(f"{ratio:g}, Fisher joint", getattr(joint.found, value), look))
        if value == "token_perplexity":
            levels.append(Level("dense", dense_perplexity))
        panels.append(
            Panel(
                title,
                measure,
                "gamma: MLP rate / attention rate, log scale",
                gammas,
                [f"{gamma:g}" for gamma in gammas],
                curves,
                levels,
                marked=(published, "published"),
                log=True,
                log_x=True,
            )
        )
    notes = [f"{_BARS} the published gamma of the ratio; dashed: Fisher saliency, all units in one list, no gamma"]
    if any(each.more.get("capped") for each in cells):
        notes.append("hollow: one module cannot lose as much as gamma asks for, the other makes up for it")
    return draw("gamma_sweep", panels, png, notes)


def draw_alignment(cells: Sequence[Cell], dense_perplexity: float, png: Path) -> list[Path]:
    """Draw perplexity, KL and both latencies against the rounding, one curve a ratio."""
    roundings = sorted({each.names["round_to"] for each in cells})
    ticks = list(range(len(roundings)))
    labels = [f"{each}" for each in roundings]

    def curves(spot_of: Callable[[Cell, float], Spot]) -> list[Curve]:
        return [
            Curve(
                f"ratio {ratio:g}",
                [spot_of(c, roundings.index(c.names["round_to"])) for c in alignment.reached_at(cells, ratio)],
                look,
            )
            for look, ratio in enumerate(alignment.ratios_of(cells))
        ]

    def latency(phase: str) -> Callable[[Cell, float], Spot]:
        return lambda cell, x: Spot(x, *(cell.more[f"{phase}_{name}"] for name in ("ratio", "low", "high")))

    x = "round_to: kept neurons of a layer are a multiple of it"
    panels = [
        Panel(
            "Perplexity",
            _PERPLEXITY,
            x,
            ticks,
            labels,
            curves(perplexity_spot),
            [Level("dense", dense_perplexity)],
            log=True,
        ),
        Panel("KL on held-out text", _KL, x, ticks, labels, curves(kl_spot)),
    ]
    panels += [
        Panel(
            f"{phase.capitalize()} latency",
            "pruned / dense, median of rounds in turns; below 1 is faster",
            x,
            ticks,
            labels,
            curves(latency(phase)),
            [Level("dense", 1.0)],
        )
        for phase in PHASES
    ]
    notes = [f"{_BARS} the finest rounding of the ratio; of latencies: the middle half of the rounds"]
    return draw("alignment", panels, png, notes)


def draw_modules(cells: Sequence[Cell], dense_perplexity: float, png: Path) -> list[Path]:
    """Draw perplexity and KL against the ratio, one curve a place, a row a method."""
    ratios = sorted({each.names["ratio"] for each in cells})
    titles = {"nirvana": "NIRVANA saliency", "fisher": "Fisher saliency"}
    panels = []
    for method in dict.fromkeys(each.names["method"] for each in cells):
        for title, measure, spot_of, log in (
            ("perplexity", _PERPLEXITY, perplexity_spot, True),
            ("KL on held-out text", _KL, kl_spot, False),
        ):
            curves = [
                Curve(
                    modules.TITLES[where],
                    [
                        spot_of(each, each.names["ratio"])
                        for each in sorted(cells, key=lambda each: each.names["ratio"])
                        if (each.names["method"], each.names["where"]) == (method, where) and each.judged
                    ],
                    look,
                )
                for look, where in enumerate((modules.BOTH, "mlp", "attention"))
            ]
            levels = [Level("dense", dense_perplexity)] if log else []
            panels.append(
                Panel(
                    f"{titles.get(method, method)}: {title}",
                    measure,
                    "pruning ratio, of all block weights",
                    ratios,
                    [f"{ratio:g}" for ratio in ratios],
                    curves,
                    levels,
                    log=log,
                )
            )
    notes = [f"{_BARS} pruning both at that ratio"]
    out = {each.names["ratio"] for each in cells if not each.judged and each.names["where"] == "attention"}
    if out:
        notes.append(f"attention alone cannot reach {', '.join(f'{ratio:g}' for ratio in sorted(out))}")
    return draw("modules", panels, png, notes)


def draw_attention_factor(cells: Sequence[Cell], dense_perplexity: float, png: Path) -> list[Path]:
    """Draw KL and perplexity against the factor, one curve a ratio."""
    factors = sorted({each.names["factor"] for each in cells})
    panels = []
    for title, measure, spot_of, levels in (
        ("Held-out KL", _KL, kl_spot, []),
        ("Perplexity on other text", _PERPLEXITY, perplexity_spot, [Level("dense", dense_perplexity)]),
    ):
        curves = [
            Curve(
                f"ratio {ratio:g}",
                [spot_of(each, each.names["factor"]) for each in attention_factor.judged_at(cells, ratio)],
                look,
            )
            for look, ratio in enumerate(attention_factor.ratios_of(cells))
        ]
        panels.append(
            Panel(
                title,
                measure,
                "attention_factor: a KV group counts so many times, log scale",
                factors,
                [f"{factor:g}" for factor in factors],
                curves,
                levels,
                marked=(attention_factor.DEFAULT, "default"),
                log=bool(levels),
                log_x=True,
            )
        )
    notes = [f"{_BARS} the default factor of the ratio; mask Fisher, output projections solved for by least squares"]
    return draw("attention_factor", panels, png, notes)


DRAW = {
    gamma_sweep.STUDY: draw_gamma,
    attention_factor.STUDY: draw_attention_factor,
    alignment.STUDY: draw_alignment,
    modules.STUDY: draw_modules,
}
"""By the study's name."""
