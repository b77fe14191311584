"""Where may weights leave? MLP alone, attention alone, or both, at one total ratio.

`both` is how the method ranks: published saliency with its gamma, Fisher in one list. Alone, the units of one module
are ranked over all layers and the other module stays whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from nirvana.allocation import Keep, allocate
from nirvana.architectures.site import Module, Site
from nirvana.errors import InputError
from studies.comparison import DENSE, Comparison
from studies.methods import method_named
from studies.store import cached
from studies.sweep.cells import (
    SHOWN,
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

STUDY = "modules"
BOTH = "both"
WHERE: tuple[str, ...] = ("mlp", "attention", BOTH)
TITLES = {"mlp": "MLP only", "attention": "attention only", BOTH: "both"}
NAMES = ("method", "ratio", "where")


@dataclass(frozen=True)
class Settings:
    """What is pruned by what; where a module alone cannot reach a ratio, that is said."""

    methods: tuple[str, ...] = ("nirvana", "fisher")
    ratios: tuple[float, ...] = (0.05, 0.1, 0.2)


def measure(comparison: Comparison, settings: Settings) -> list[dict[str, Any]]:
    """Return the dense model's row and one a method, ratio and place; known ones are not computed again.

    Raises:
        InputError: If a method is unknown, ranks each layer by itself or protects some.
    """
    for name in settings.methods:
        if method_named(name).ranking == "layers" or any(method_named(name).protected):
            raise InputError(f"{name}: expected a method that ranks the units of all layers together; leave it out")
    wanted = [(name, ratio, where) for name in settings.methods for ratio in settings.ratios for where in WHERE]
    rows = [comparison.dense() | {"where": ""}]
    with tqdm(wanted, desc="pruning modules", unit="row") as bar:
        for name, ratio, where in bar:
            bar.set_postfix_str(f"{name} {ratio:g} {TITLES[where]}")
            names = {"method": name, "ratio": ratio, "where": where}
            rows.append(unless_unreachable(names, lambda of=(name, ratio, where): row(comparison, *of)))  # type: ignore[misc]
    return rows


def row(comparison: Comparison, name: str, ratio: float, where: str) -> Row:
    """Return one row of `studies.comparison`, units leaving in one place only.

    Raises:
        InputError: If the ratio cannot be reached there.
    """
    if where == BOTH:
        return comparison.row(name, ratio)
    key = {"study": STUDY, "kind": "row", "model": comparison.model, "method": name, "ratio": ratio, "where": where}
    key |= {"ranking": method_named(name).ranking, "round_to": comparison.round_to}
    key |= {
        "texts": {each: getattr(comparison.texts, each).digest for each in ("calibration", "heldout", "evaluation")}
    }
    return cached(key, lambda: _row(comparison, name, ratio, "mlp" if where == "mlp" else "attention"))


def _row(comparison: Comparison, name: str, ratio: float, module: Module) -> dict[str, Any]:
    method, sites = method_named(name), comparison.stack.architecture.sites()
    saliency = comparison.scores(method).saliency
    if method.ranking == "joint":
        saliency = {site.name: saliency[site.name] / np.float32(site.weights_per_unit) for site in sites}
    return comparison.judged(keep_elsewhere(sites, saliency, module, ratio, comparison.round_to))


def keep_elsewhere(
    sites: Sequence[Site], saliency: Mapping[str, NDArray[np.float32]], module: Module, ratio: float, round_to: int = 8
) -> Keep:
    """Return which units stay when one module alone has to meet a ratio.

    Args:
        sites: Of the whole model.
        saliency: By site name; the least leave first, whatever they weigh.
        module: Where units leave. One KV group, or `round_to` neurons, stays in every layer.
        ratio: Share of all block weights that leaves; attention comes as near to it as whole KV groups do.
        round_to: Kept neurons of a layer are a multiple of this (or all of them).

    Raises:
        InputError: If the module is too small for it.
    """
    of = [site for site in sites if site.module == module]
    total, own = (sum(site.weights for site in each) for each in (sites, of))
    least = 1 if module == "attention" else round_to
    most = sum(max(0, site.units - least) * site.weights_per_unit for site in of) / total
    if ratio > most:
        raise InputError(
            f"pruning_ratio: {ratio:g} cannot be reached in {module} alone: at most {int(most * 10_000) / 10_000:g} of "
            "the block weights can leave there; ask for at most that"
        )
    whole = {site.name: np.arange(site.units, dtype=np.int64) for site in sites}
    if module == "attention":
        return whole | _groups(of, saliency, ratio * total)
    # one list of units "by saliency a weight" is one list by saliency where that was multiplied first
    raw = {site.name: saliency[site.name] * np.float32(site.weights_per_unit) for site in of}
    return whole | allocate(of, raw, ratio * total / own, 1.0, round_to, ranking="joint")


def _groups(sites: Sequence[Site], saliency: Mapping[str, NDArray[np.float32]], target: float) -> Keep:
    """Let the least salient KV groups of all layers leave, each layer's best apart, until the target is nearest."""
    candidates = sorted(
        (float(saliency[site.name][unit]), position, int(unit))
        for position, site in enumerate(sites)
        for unit in np.argsort(saliency[site.name], kind="stable")[:-1]
    )
    gone = np.cumsum([0, *(sites[position].weights_per_unit for _, position, _ in candidates)])
    leaving: dict[int, list[int]] = {}
    for _, position, unit in candidates[: int(np.argmin(np.abs(gone - target)))]:
        leaving.setdefault(position, []).append(unit)
    return {
        site.name: np.setdiff1d(np.arange(site.units, dtype=np.int64), leaving.get(position, []))
        for position, site in enumerate(sites)
    }


# --- what came out --------------------------------------------------------------------------------------------


def cells_of(rows: Sequence[Row]) -> list[Cell]:
    """Return a cell a row but the dense one's, held against `both` of its method and ratio."""
    return [
        cell(each, NAMES, reference_of(rows, method=each["method"], ratio=each["ratio"], where=BOTH))
        for each in rows
        if each["method"] != DENSE
    ]


def verdict(cells: Sequence[Cell]) -> list[str]:
    """Say of each method and ratio which place costs least."""
    sentences = []
    for method, ratio in dict.fromkeys((each.names["method"], each.names["ratio"]) for each in cells):
        mine = [each for each in cells if (each.names["method"], each.names["ratio"]) == (method, ratio)]
        reached = [each for each in mine if each.judged]
        out = [TITLES[each.names["where"]] for each in mine if not each.judged]
        if not reached:
            sentences.append(f"{method} at {ratio:g}: out of reach.")
            continue
        # of equals both: nothing is gained by leaving one whole
        best = min(reached, key=lambda each: (each.found.token_perplexity, each.names["where"] != BOTH))
        sentence = f"{method} at {ratio:g}: {TITLES[best.names['where']]} costs least, perplexity "
        sentence += f"{best.found.token_perplexity:.2f} (KL {best.found.kl_divergence:.3f})"
        others = [
            f"{TITLES[each.names['where']]} {each.found.token_perplexity:.2f}" for each in reached if each is not best
        ]
        sentence += f"; {', '.join(others)}" if others else ""
        if best.names["where"] != BOTH and any(each.names["where"] == BOTH for each in reached):
            sentence += f"; against both it is {verdict_of(best.found)}"
        sentence += f"; {' and '.join(out)} cannot reach it" if out else ""
        sentences.append(f"{sentence}.")
    return sentences


def tables(cells: Sequence[Cell]) -> dict[str, list[list[str]]]:
    """Return the cells as text, by title: a table a method, a header, then one row each."""
    result = {}
    for method in dict.fromkeys(each.names["method"] for each in cells):
        rows = result[f"{method}; differences to pruning both with 95 % intervals"] = [["ratio", *SHOWN]]
        for each in (each for each in cells if each.names["method"] == method):
            where = each.names["where"]
            name = f"{each.names['ratio']:g} {TITLES[where].removesuffix(' only')}"
            rows.append([name, *shown(each.judged, where == BOTH)])
    return result


def notes(cells: Sequence[Cell]) -> list[str]:
    """Return what the tables need to be read."""
    return sorted({each.unreachable for each in cells if each.unreachable})


def children(cells: Sequence[Cell]) -> dict[str, list[Series]]:
    """Return what MLflow takes: a child a method and place, by ratio in percent."""
    result = {}
    for method, where in dict.fromkeys((each.names["method"], each.names["where"]) for each in cells):
        mine = [each for each in cells if (each.names["method"], each.names["where"]) == (method, where)]
        result[f"{method}, {TITLES[where]}"] = series(
            mine, "ratio_per_mille", lambda each: round(1000 * each.names["ratio"])
        )
    return result
