"""Which gamma? Published saliency at several ratios of MLP rate to attention rate, rule `exact`.

Held-out KL may choose gamma, as it chooses the calibration set; perplexity on other text says what that is worth.
`fisher` with its joint ranking, which needs no gamma, stands beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from nirvana.allocation import module_rates
from studies.comparison import DENSE, Comparison
from studies.methods import METHODS
from studies.store import cached
from studies.sweep.cells import (
    SHOWN,
    UNREACHABLE,
    Cell,
    Row,
    cell,
    reference_of,
    series,
    shown,
    unless_unreachable,
    verdict_of,
)
from studies.tracking import Series

STUDY = "gamma_sweep"
SWEPT, JOINT = "nirvana", "fisher"
PUBLISHED = METHODS[SWEPT].gamma
NAMES = ("method", "ratio", "gamma")


@dataclass(frozen=True)
class Settings:
    """What is swept; the published gamma always takes part."""

    gammas: tuple[float, ...] = (0.5, 1.0, 2.0, PUBLISHED, 5.0, 8.0)
    ratios: tuple[float, ...] = (0.2, 0.4)

    @property
    def grid(self) -> tuple[float, ...]:
        """All gammas, ascending."""
        return tuple(sorted({*self.gammas, PUBLISHED}))


def measure(comparison: Comparison, settings: Settings) -> list[dict[str, Any]]:
    """Return the dense model's row, and at each ratio one a gamma and the joint ranking's (gamma None).

    A gamma is `capped` where attention or MLP cannot lose as much as it asks for; the other then makes up for it.
    """
    wanted: list[tuple[float, float | None]] = [(r, gamma) for r in settings.ratios for gamma in (*settings.grid, None)]
    rows = [comparison.dense() | {"gamma": None}]
    with tqdm(wanted, desc="sweeping gamma", unit="row") as bar:
        for ratio, gamma in bar:
            method = METHODS[JOINT] if gamma is None else replace(METHODS[SWEPT], gamma=gamma)
            bar.set_postfix_str(f"{method.name} {ratio:g} {gamma or 'joint'}")
            names = {"method": method.name, "ratio": ratio, "gamma": gamma}
            row = unless_unreachable(names, lambda method=method, ratio=ratio: comparison.row(method, ratio))  # type: ignore[misc]
            if gamma is not None and UNREACHABLE not in row:
                row["capped"] = is_capped(row["achieved_by_module"]["attention"], weights(comparison), ratio, gamma)
            rows.append(row)
    return rows


def weights(comparison: Comparison) -> dict[str, Any]:
    """Return block weights and units of `attention` and `mlp`, without opening the model where they are known."""
    key = {"study": STUDY, "kind": "weights", "model": comparison.model}
    return cached(key, lambda: _weights(comparison))


def _weights(comparison: Comparison) -> dict[str, Any]:
    sites = comparison.stack.architecture.sites()
    result: dict[str, Any] = {}
    for module in ("attention", "mlp"):
        of = [site for site in sites if site.module == module]
        result[module] = {"weights": sum(site.weights for site in of), "units": sum(site.units for site in of)}
    return result


def is_capped(attention_rate: float, sizes: Row, ratio: float, gamma: float) -> bool:
    """Tell whether attention lost another share than gamma asks for, by more than one KV group."""
    block = {module: sizes[module]["weights"] for module in ("attention", "mlp")}
    asked = module_rates(block, None, ratio, gamma)["attention"]
    return abs(attention_rate - asked) * sizes["attention"]["units"] > 1 + 1e-6


# --- what came out --------------------------------------------------------------------------------------------


def cells_of(rows: Sequence[Row]) -> list[Cell]:
    """Return a cell a row but the dense one's, held against the published gamma at its ratio."""
    found = []
    for row in rows:
        if row["method"] == DENSE:
            continue
        more = {}
        if "achieved_by_module" in row:
            rates = row["achieved_by_module"]
            more = {"attention_rate": rates["attention"], "mlp_rate": rates["mlp"], "capped": row.get("capped", False)}
        reference = reference_of(rows, method=SWEPT, ratio=row["ratio"], gamma=PUBLISHED)
        found.append(cell(row, NAMES, reference, more))
    return found


def chosen(cells: Sequence[Cell], ratio: float) -> Cell | None:
    """Return the gamma of the least held-out KL at a ratio; of equals the one nearest to the published."""
    swept = [each for each in swept_at(cells, ratio) if each.judged]
    return min(swept, key=lambda each: (each.found.kl_divergence, abs(each.names["gamma"] - PUBLISHED)), default=None)


def swept_at(cells: Sequence[Cell], ratio: float) -> list[Cell]:
    """Return the cells that have a gamma."""
    return [each for each in cells if each.names["ratio"] == ratio and each.names["gamma"] is not None]


def joint_at(cells: Sequence[Cell], ratio: float) -> Cell | None:
    """Return the cell of the joint ranking, where it was reached."""
    return next((c for c in cells if c.names["ratio"] == ratio and c.names["gamma"] is None and c.judged), None)


def ratios_of(cells: Sequence[Cell]) -> list[float]:
    """Return the ratios that occur, ascending."""
    return sorted({each.names["ratio"] for each in cells})


def verdict(cells: Sequence[Cell]) -> list[str]:
    """Say at each ratio which gamma held-out KL chooses, what that is worth, and how the joint ranking stands."""
    sentences = []
    for ratio in ratios_of(cells):
        best = chosen(cells, ratio)
        if best is None:
            sentences.append(f"Ratio {ratio:g}: no gamma reaches it: {swept_at(cells, ratio)[0].unreachable}.")
            continue
        gamma, found = best.names["gamma"], best.found
        sentence = f"Ratio {ratio:g}: held-out KL chooses gamma {gamma:g} (KL {found.kl_divergence:.3f}, perplexity "
        sentence += f"{found.token_perplexity:.2f})"
        if gamma == PUBLISHED:
            sentence += ", the published one"
        else:
            sentence += f"; against the published {PUBLISHED:g} its loss is {verdict_of(found)}"
        least = min((c for c in swept_at(cells, ratio) if c.judged), key=lambda each: each.found.token_perplexity)
        if least is not best:
            sentence += f"; gamma {least.names['gamma']:g} has the least perplexity, {least.found.token_perplexity:.2f}"
        joint = joint_at(cells, ratio)
        if joint is not None:
            sentence += (
                f"; {JOINT}'s joint ranking, without a gamma, has KL {joint.found.kl_divergence:.3f} and perplexity "
                f"{joint.found.token_perplexity:.2f}"
            )
        sentences.append(f"{sentence}.")
    return sentences


def tables(cells: Sequence[Cell]) -> dict[str, list[list[str]]]:
    """Return the cells as text, by title: a table a ratio, a header, then one row each."""
    result = {}
    for ratio in ratios_of(cells):
        rows = result[f"Ratio {ratio:g}; differences to gamma {PUBLISHED:g} with 95 % intervals"] = [["gamma", *SHOWN]]
        for each in (each for each in cells if each.names["ratio"] == ratio):
            gamma = each.names["gamma"]
            name = f"{JOINT} joint" if gamma is None else f"{gamma:g}{' *' if each.more.get('capped') else ''}"
            rows.append([name, *shown(each.judged, gamma == PUBLISHED)])
    return result


def notes(cells: Sequence[Cell]) -> list[str]:
    """Return what the tables need to be read."""
    if any(each.more.get("capped") for each in cells):
        return ["*  attention or MLP cannot lose as much as gamma asks for; the other makes up for it"]
    return []


def children(cells: Sequence[Cell]) -> dict[str, list[Series]]:
    """Return what MLflow takes: a child a ratio, by gamma in percent; the joint ranking's by ratio in percent."""
    result = {
        f"ratio {ratio:g}": series(
            swept_at(cells, ratio), "gamma_percent", lambda each: round(100 * each.names["gamma"])
        )
        for ratio in ratios_of(cells)
    }
    joint = [each for each in cells if each.names["gamma"] is None]
    return result | {f"{JOINT} joint": series(joint, "ratio_percent", lambda each: round(100 * each.names["ratio"]))}
