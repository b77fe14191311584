"""Every method that a study may compare: how it scores, how it spends a budget, and its scores kept on disk.

A sweep over ratios, gammas or roundings asks for the same saliency again and again; it is computed once.
"""

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nirvana.allocation import Allocation, Keep, allocate
from nirvana.architectures.site import Module, Site
from nirvana.errors import InputError
from nirvana.files import atomic_file

# their code is part of what rows depend on: see studies.store
from nirvana.methods import fisher, flap, llm_pruner, lm_loss, magnitude, nirvana, random, wanda_sp  # noqa: F401
from nirvana.methods.method import Method, Scoring
from nirvana.methods.registry import METHODS, method_named
from nirvana.walk import Ids, Stack
from studies.store import STUDIES, study_key

if TYPE_CHECKING:
    from studies.variants import Variant

Tensors = dict[str, NDArray[Any]]
SEEDED = frozenset(name for name, method in METHODS.items() if method.seeded)
"""Those whose scores depend on the seed: of the labels, of the draw."""
BOTH = "both"
"""Units of attention and of MLPs may leave."""
FOLDER = "compare"
"""Where scores are kept, whatever study asks for them."""


def allocation_of(variant: "Variant", round_to: int) -> Allocation:
    """Return what a variant asks for: its method's own, but for what it changes; `round_to` unless it says another."""
    method = method_named(variant.method)
    changed = {name: getattr(variant, name) for name in ("gamma", "attention_factor", "round_to")}
    changed = {name: value for name, value in changed.items() if value is not None}
    return method.allocation(variant.ratio, **{"round_to": round_to, "rule": variant.rule} | changed)


def keep_of(
    variant: "Variant", sites: Sequence[Site], saliency: Mapping[str, NDArray[np.float32]], round_to: int
) -> Keep:
    """Return which units stay.

    Args:
        variant: Its method, ratio, rule and the module where units may leave decide.
        sites: Where units live, in walk order.
        saliency: Unit saliency by site name.
        round_to: Kept neurons of a layer are a multiple of this, unless the variant says otherwise.

    Raises:
        InputError: If the ratio cannot be reached, or no layer is left to prune.
    """
    method, asked = method_named(variant.method), allocation_of(variant, round_to)
    if variant.where == BOTH:
        return allocate(sites, saliency, asked, per_weight=method.per_weight)
    if asked.ranking == "joint" and not method.per_weight:
        saliency = {site.name: saliency[site.name] / np.float32(site.weights_per_unit) for site in sites}
    return keep_elsewhere(
        sites, saliency, "mlp" if variant.where == "mlp" else "attention", variant.ratio, asked.round_to
    )


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
    asked = Allocation(ratio * total / own, ranking="joint", round_to=round_to)
    return whole | allocate(of, saliency, asked, per_weight=True)


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


@dataclass(frozen=True)
class Scores:
    """Unit saliency by site name, and the seconds that it took when it was computed."""

    saliency: dict[str, NDArray[np.float32]]
    seconds: float


def scores_of(
    method: Method,
    open_stack: Callable[[], Stack],
    model: str,
    ids: Ids,
    calibration: str,
    seed: int = 0,
    microbatch: int = 2,
) -> Scores:
    """Return a method's saliency on a calibration set, computed once for all studies.

    Args:
        method: What scores.
        open_stack: Opens the dense model; not called where the scores are known.
        model: The model's digest.
        ids: Calibration sequences.
        calibration: Their digest.
        seed: Of what the method draws, if anything.
        microbatch: Sequences a forward where gradients are wanted.
    """
    parts: dict[str, Any] = {"kind": "saliency", "method": method.name, "model": model, "calibration": calibration}
    parts["seed"] = seed if method.name in SEEDED else 0

    def compute() -> Tensors:
        found = method.scorer(open_stack(), ids, Scoring(microbatch, seed))
        return {name: values.numpy() for name, values in found.items()}

    return Scores(*cached_tensors(parts, method.scorer, compute))


def cached_tensors(parts: Mapping[str, Any], code: Any, compute: Callable[[], Tensors]) -> tuple[Tensors, float]:
    """Return tensors and the seconds they took: the file's if there is one, else computed and kept.

    Args:
        parts: Everything that they depend on and JSON can hold.
        code: The function behind them, whose module's code becomes part of the key.
        compute: Returns them.
    """
    file = STUDIES / FOLDER / f"{study_key({'study': FOLDER, **parts}, inspect.unwrap(code))}.safetensors"
    with suppress(SafetensorError, OSError, KeyError, TypeError, ValueError):  # missing or broken: computed again
        return _read(file)
    start = time.monotonic()
    tensors = {name: np.ascontiguousarray(values) for name, values in compute().items()}
    with atomic_file(file) as temporary:
        save_file(tensors, temporary, metadata={"seconds": f"{time.monotonic() - start:.3f}"})
        temporary.chmod(0o644)
    return _read(file)


def _read(file: Path) -> tuple[Tensors, float]:
    with safe_open(file, framework="np") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, float(opened.metadata()["seconds"])
