"""From unit saliency to the units that stay.

Ranking is global over layers, separately for KV groups and for MLP neurons. With A and M the block weights in attention
and MLP, ratio r and γ = MLP rate ÷ attention rate:  p_attn = r·(A+M)/(A+γM),  p_mlp = γ·p_attn.

Saliency that is comparable between attention and MLP (mask Fisher) needs no γ: all units form one list, in the order of
their saliency a weight. A KV group is so large a unit that a second-order estimate says too little of it, so its
saliency may count several times (docs/decisions/0018-attention-counts-twice.md).

Or every layer loses the same share, as LLM-Pruner and Wanda-sp have it. Both codes round the number of heads that a
layer loses down (`int(ratio * heads)`). With few KV groups that decides: of SmolLM2's three, a share of 0.2 takes none,
where the nearest count would take a third of attention. Neurons then make up for the rest; the codes miss the budget.

Sites that must keep equally many units (the experts of a layer) are ranked as one: its n-th unit is the n-th best of
each of them.

Sources: NIRVANA (arXiv 2509.14230), allocation. Caps, exact counts and the uniform scope are ours (docs/concepts.md).
LLM-Pruner (arXiv 2305.11627), local pruning, LLMPruner/torch_pruning/pruner/algorithms/metapruner.py, `prune_local`;
FLAP's repository, lib/prune.py, `prune_wanda_sp`.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from nirvana.architectures.site import Module, Site
from nirvana.errors import InputError

Rule = Literal["exact", "published"]
Ranking = Literal["modules", "joint", "layers"]
"""Who competes with whom: KV groups with KV groups and neurons with neurons, the two rates `gamma` apart; all units of
the model in one list, by saliency a weight; or the units of one layer only, every layer losing the same share."""
Scope = Literal["global", "uniform"]
Keep = dict[str, NDArray[np.int64]]
"""Sorted indices of the units that stay, by site name."""

_COUNT_SLACK = 1e-6
"""Added before rounding a count down, so that 0.3 * 10 counts 3 and not 2."""
_LAYERS = 32
"""Depth of the model that the paper of a method with protected layers speaks of: LLaMA-7B's."""


@dataclass(frozen=True)
class Allocation:
    """How many units leave, and where: section `allocation` of params.yaml, and of a plan.

    Raises:
        InputError: If a value is out of range, or two contradict each other.
    """

    pruning_ratio: float
    """Share of the block weights that leaves, protected layers included, in [0, 1)."""
    ranking: Ranking = "modules"
    gamma: float = 1.0
    """MLP rate divided by attention rate, above 0; ranking `joint` does not read it."""
    attention_factor: float = 1.0
    """How many times the saliency of a KV group counts in a joint ranking, above 0."""
    round_to: int = 8
    """Kept neurons of a layer are a multiple of this (or all of them)."""
    rule: Rule = "exact"
    """`exact` meets the ratio to within one `round_to` block of one layer; `published` counts as the authors' code does
    and may miss it."""
    scope: Scope = "global"
    """`global` ranks over all layers; `uniform` keeps the same counts in every layer, so that a stock configuration
    describes the result, and meets the ratio to within one `round_to` block of every layer. With it a joint ranking
    gives the two rates."""
    protected_layers: tuple[int, int] = (0, 0)
    """First and last layers that lose nothing, of a model of 32 layers; as many in proportion in others."""

    def __post_init__(self) -> None:
        if not 0 <= self.pruning_ratio < 1:
            raise InputError(f"pruning_ratio: expected 0 <= ratio < 1, got {self.pruning_ratio}; choose e.g. 0.2")
        for name, example in (("gamma", 3.36), ("attention_factor", 2)):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name}: expected a finite number above 0, got {value}; choose e.g. {example}")
        if not (isinstance(self.round_to, int) and self.round_to >= 1):
            raise InputError(f"round_to: expected a whole number above 0, got {self.round_to}; choose e.g. 8")
        for name, choices in (("ranking", Ranking), ("rule", Rule), ("scope", Scope)):
            if getattr(self, name) not in get_args(choices):
                raise InputError(f"{name}: expected one of {', '.join(get_args(choices))}, got {getattr(self, name)!r}")
        if self.scope == "uniform" and self.rule == "published":
            raise InputError(
                "expected rule exact with scope uniform, got published, which ranks over all layers; "
                "change rule to exact or scope to global"
            )
        if self.ranking != "modules" and self.rule == "published":
            raise InputError(
                f"expected rule exact with ranking {self.ranking}, got published, which ranks each module by itself; "
                "change rule to exact or ranking to modules"
            )
        if self.scope == "uniform" and any(self.protected_layers):
            raise InputError(
                f"expected scope global with protected_layers {list(self.protected_layers)}, which keep more than the "
                "others, got uniform; change scope to global or protected_layers to [0, 0]"
            )


def allocate(
    sites: Sequence[Site],
    saliency: Mapping[str, NDArray[np.float32]],
    allocation: Allocation,
    loadable_kv_groups: Callable[[int], bool] = lambda kept: True,
    per_weight: bool = False,
) -> Keep:
    """Return which units stay.

    Args:
        sites: Where units live, in walk order.
        saliency: Unit saliency by site name.
        allocation: What is asked for.
        loadable_kv_groups: For scope `uniform`: whether a stock configuration accepts that many KV groups.
        per_weight: Whether the saliency is that of a weight already (`nirvana.methods.method.Method.per_weight`). Else
            a joint ranking divides a unit's by the number of its weights.

    Returns:
        Sorted indices of the kept units by site name.

    Raises:
        InputError: If the ratio cannot be reached (the message names the largest reachable one), `round_to` is larger
            than a layer, no layer is left to prune, or the saliency does not belong to these sites.
    """
    _check_saliency(sites, saliency)
    inner, asked = _unprotected(sites, allocation)
    if asked.ranking == "layers":
        inner, asked, loadable_kv_groups = _same_share(inner, asked, loadable_kv_groups)
    whole = {site.name: np.arange(site.units, dtype=np.int64) for site in sites}
    return whole | _allocate(inner, saliency, asked, loadable_kv_groups, per_weight)


def protected_layers(of_32: tuple[int, int], num_layers: int) -> tuple[int, int]:
    """Return how many first and last layers lose nothing, from what that is of 32: the same share, rounded."""
    first, last = ((count * num_layers + _LAYERS // 2) // _LAYERS for count in of_32)
    return first, last


def _unprotected(sites: Sequence[Site], allocation: Allocation) -> tuple[Sequence[Site], Allocation]:
    """Return the sites of the layers that may lose units, and what is then asked of them."""
    layers = sorted({site.layer for site in sites})
    first, last = protected_layers(allocation.protected_layers, len(layers))
    if not first + last:
        return sites, replace(allocation, protected_layers=(0, 0))
    inner = [site for site in sites if site.layer in layers[first : max(first, len(layers) - last)]]
    if not inner:
        raise InputError(f"expected layers beside the {first + last} protected ones, got {len(layers)} in all")
    ratio, total, own = allocation.pruning_ratio, *(sum(site.weights for site in each) for each in (sites, inner))
    share = ratio * total / own
    if share >= 1:
        raise InputError(
            f"pruning_ratio: {ratio} cannot be reached with {first + last} of {len(layers)} layers protected; "
            f"ask for less than {ratio / share:.4f}"
        )
    return inner, replace(allocation, pruning_ratio=share, protected_layers=(0, 0))


def _same_share(
    sites: Sequence[Site], allocation: Allocation, loadable_kv_groups: Callable[[int], bool]
) -> tuple[Sequence[Site], Allocation, Callable[[int], bool]]:
    """Turn a ranking by layers into equal counts in every layer, the number of KV groups rounded down."""
    if allocation.scope == "global":  # an encoder-decoder's layers need not keep the same heads here
        sites = [replace(site, aligned_with=None) for site in sites]
    weights = {module: sum(site.weights for site in sites if site.module == module) for module in ("attention", "mlp")}
    rate = module_rates(weights, None, allocation.pruning_ratio, allocation.gamma)["attention"]
    groups = next(site.units for site in sites if site.module == "attention")
    least = groups - math.floor(min(rate, 1.0) * groups + _COUNT_SLACK)
    uniform = replace(allocation, ranking="modules", scope="uniform")
    # a stock configuration is asked for by scope `uniform` alone
    stock = loadable_kv_groups if allocation.scope == "uniform" else lambda kept: True
    return sites, uniform, lambda kept: kept >= least and stock(kept)


def _allocate(
    sites: Sequence[Site],
    saliency: Mapping[str, NDArray[np.float32]],
    allocation: Allocation,
    loadable_kv_groups: Callable[[int], bool],
    per_weight: bool,
) -> Keep:
    if allocation.scope == "uniform":
        saliency = _aligned(sites, saliency)
    ranked, ranked_saliency = _merged(sites, saliency, per_weight)
    request = _Request(ranked, ranked_saliency, allocation, per_weight)
    request.check()
    counts = _joint(request) if allocation.ranking == "joint" else None
    if allocation.scope == "uniform":
        keep = _uniform(request, loadable_kv_groups, counts)
    elif counts is not None:
        keep = {site.name: _best(site, request.saliency, counts[site.name]) for site in request.sites}
    else:
        keep = _published(request) if allocation.rule == "published" else _exact(request)
    return {
        site.name: keep[site.name] if site.equal_with is None else _best(site, saliency, len(keep[site.equal_with]))
        for site in sites
    }


def _check_saliency(sites: Sequence[Site], saliency: Mapping[str, NDArray[np.float32]]) -> None:
    for site in sites:
        values = saliency.get(site.name)
        if values is None or values.shape != (site.units,) or not np.isfinite(values).all():
            got = "nothing" if values is None else f"shape {values.shape} or values that are not finite"
            raise InputError(
                f"{site.name}: expected {site.units} finite saliency values, got {got}; "
                "the saliency belongs to another model: collect it again"
            )


def _aligned(sites: Sequence[Site], saliency: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """Give sites that must keep the same indices their common sum, so that they do."""
    groups: dict[str, list[str]] = {}
    _check_one_size(sites)
    for site in sites:
        groups.setdefault(site.aligned_with or f"{site.name} alone", []).append(site.name)
    sums = {name: np.sum([saliency[each] for each in names], axis=0) for names in groups.values() for name in names}
    return {name: total.astype(np.float32) for name, total in sums.items()}


def _merged(
    sites: Sequence[Site], saliency: Mapping[str, NDArray[np.float32]], per_weight: bool
) -> tuple[tuple[Site, ...], dict[str, NDArray[np.float32]]]:
    """Replace sites that keep equally many units by one that owns all of their slots.

    Its unit u is the u-th least salient unit of each: keeping n of it keeps the n best of each. Its saliency is their
    sum, or where it is that of a weight, their mean.
    """
    merged: dict[str, Site] = {}
    values: dict[str, NDArray[np.float32]] = {}
    for site in sites:
        if site.equal_with is None:
            merged[site.name], values[site.name] = site, saliency[site.name]
            continue
        key, ascending = site.equal_with, np.sort(saliency[site.name])
        slots = merged[key].slots if key in merged else ()
        merged[key] = replace(site, name=key, slots=(*slots, *site.slots), equal_with=None)
        values[key] = values[key] + ascending if key in values else ascending
    if per_weight:
        members = Counter(site.equal_with for site in sites)
        values |= {key: values[key] / np.float32(count) for key, count in members.items() if key is not None}
    return tuple(merged.values()), values


def achieved_ratio(sites: Sequence[Site], kept_units: Mapping[str, int]) -> dict[str, float]:
    """Return the measured share of block weights that leave: total, attention and mlp."""
    weights: dict[str, list[int]] = {"total": [0, 0], "attention": [0, 0], "mlp": [0, 0]}
    for site in sites:
        removed = (site.units - kept_units[site.name]) * site.weights_per_unit
        for key in ("total", site.module):
            weights[key][0] += removed
            weights[key][1] += site.weights
    return {key: removed / total if total else 0.0 for key, (removed, total) in weights.items()}


def module_rates(
    weights: Mapping[str, int | float],
    removable: Mapping[str, int | float] | None,
    pruning_ratio: float,
    gamma: int | float,
) -> dict[str, float]:
    """Return p_attn and p_mlp, before whole units are counted.

    Args:
        weights: Block weights of each module.
        removable: Those that may leave; a rate that would pass this cap is clipped there and the other one meets the
            total. None: no caps, as the published rule.
        pruning_ratio: Share of all block weights that leaves.
        gamma: MLP rate divided by attention rate.

    Source: NIRVANA (arXiv 2509.14230), allocation; the caps are ours.
    """
    target = pruning_ratio * (weights["attention"] + weights["mlp"])
    lost = target * weights["attention"] / (weights["attention"] + gamma * weights["mlp"])
    if removable is not None:
        lost = max(min(lost, removable["attention"]), target - removable["mlp"])
    return {"attention": lost / weights["attention"], "mlp": (target - lost) / weights["mlp"]}


def removable_weights(module: str, units: int, weights_per_unit: int, round_to: int | float) -> int | float:
    """Return a site's weights that may leave: one KV group, or one `round_to` block of neurons, stays."""
    return max(0, units - (1 if module == "attention" else round_to)) * weights_per_unit


@dataclass(frozen=True)
class _Request:
    sites: tuple[Site, ...]
    saliency: Mapping[str, NDArray[np.float32]]
    asked: Allocation
    per_weight: bool

    @property
    def pruning_ratio(self) -> float:
        return self.asked.pruning_ratio

    @property
    def round_to(self) -> int:
        return self.asked.round_to

    def check(self) -> None:
        for site in self.sites:
            if site.module == "mlp" and not 1 <= self.round_to <= site.units:
                raise InputError(
                    f"round_to: expected 1 to {site.units} (the neurons of layer {site.layer}), "
                    f"got {self.round_to}; choose a smaller multiple"
                )
        largest = (self.removable("attention") + self.removable("mlp")) / self.total
        if self.pruning_ratio > largest:
            raise InputError(
                f"pruning_ratio: {self.pruning_ratio} cannot be reached: with one KV group and {self.round_to} "
                f"neurons kept in every layer at most {_floor4(largest)} can leave; ask for at most that"
            )

    def of(self, module: Module) -> list[Site]:
        return [site for site in self.sites if site.module == module]

    def weights(self, module: Module) -> int:
        return sum(site.weights for site in self.of(module))

    @property
    def total(self) -> int:
        return sum(site.weights for site in self.sites)

    def removable(self, module: Module) -> int | float:
        return sum(
            removable_weights(module, site.units, site.weights_per_unit, self.round_to) for site in self.of(module)
        )

    def attention_rate(self) -> float:
        """Return p_attn."""
        weights = {"attention": self.weights("attention"), "mlp": self.weights("mlp")}
        removable = {"attention": self.removable("attention"), "mlp": self.removable("mlp")}
        return module_rates(weights, removable, self.pruning_ratio, self.asked.gamma)["attention"]

    def rounded(self, site: Site, kept: int) -> int:
        """Round kept neurons up to a multiple of `round_to`, at least one block, at most all."""
        blocks = max(1, -(-kept // self.round_to))
        return min(site.units, blocks * self.round_to)


def _floor4(value: float) -> float:
    return int(value * 10_000) / 10_000


def _best(site: Site, saliency: Mapping[str, NDArray[np.float32]], count: int) -> NDArray[np.int64]:
    """Return the `count` units of highest saliency; of equals the later index is the better."""
    order = np.argsort(saliency[site.name], kind="stable")
    return np.sort(order[site.units - count :]).astype(np.int64)


def _global_order(
    sites: Sequence[Site], saliency: Mapping[str, NDArray[np.float32]], protected: int
) -> NDArray[np.int64]:
    """Return the position of the owning site of every removable unit, in the order in which units leave.

    The order is (saliency, layer, index) and leaves out the best `protected` units of each site.
    """
    values, owners = [], []
    for position, site in enumerate(sites):
        ascending = np.sort(saliency[site.name], kind="stable")[: max(0, site.units - protected)]
        values.append(ascending)
        owners.append(np.full(ascending.shape, position))
    return np.concatenate(owners)[np.argsort(np.concatenate(values), kind="stable")]


def _condemned(sites: Sequence[Site], order: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return how many units each site loses when the first `count` of the order leave."""
    return np.bincount(order[:count], minlength=len(sites))


def _exact(request: _Request) -> Keep:
    """Keep the count of groups that the rate asks for and let the neurons meet the ratio.

    Where the neurons cannot make up for one group more or less, the next nearest count that lets them is taken.
    """
    groups, layers = request.of("attention"), request.of("mlp")
    order = _global_order(groups, request.saliency, protected=1)
    asked = request.attention_rate() * sum(site.units for site in groups)
    first = min(len(order), int(asked + _COUNT_SLACK))
    target = request.pruning_ratio * request.total
    tolerance = request.round_to * max((site.weights_per_unit for site in layers), default=0)
    nearest = np.inf
    for count in sorted(range(len(order) + 1), key=lambda number: (number != first, abs(number - asked))):
        lost = _condemned(groups, order, count)
        kept = {site.name: site.units - int(n) for site, n in zip(groups, lost, strict=True)}
        of_groups = sum(int(n) * site.weights_per_unit for n, site in zip(lost, groups, strict=True))
        kept |= _neurons_for(request, layers, target - of_groups)
        removed = sum((site.units - kept[site.name]) * site.weights_per_unit for site in request.sites)
        if abs(removed - target) <= tolerance:
            return {site.name: _best(site, request.saliency, kept[site.name]) for site in request.sites}
        if abs(removed - target) < abs(nearest - target):
            nearest = float(removed)
    raise _unreachable(request, nearest)


def _unreachable(request: _Request, nearest: float) -> InputError:
    return InputError(
        f"pruning_ratio: {request.pruning_ratio} cannot be reached: the units are too large for it, the nearest "
        f"reachable ratio is {nearest / request.total:.4f}; ask for that or lower round_to"
    )


def _neurons_for(request: _Request, layers: Sequence[Site], target: float) -> dict[str, int]:
    """Bisect the number of condemned neurons until the weights removed, after rounding, are closest to `target`."""
    order = _global_order(layers, request.saliency, protected=0)

    def kept(count: int) -> dict[str, int]:
        lost = _condemned(layers, order, count)
        return {site.name: request.rounded(site, site.units - int(n)) for n, site in zip(lost, layers, strict=True)}

    def removed(count: int) -> int:
        remaining = kept(count)
        return sum((site.units - remaining[site.name]) * site.weights_per_unit for site in layers)

    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if removed(middle) >= target else (middle + 1, high)
    if low > 0 and target - removed(low - 1) <= removed(low) - target:
        low -= 1
    return kept(low)


def _joint(request: _Request) -> dict[str, int]:
    """Bisect the number of condemned units of one list until the ratio is met; neurons make up for whole groups."""
    sites = request.sites
    values, owners = [], []
    for position, site in enumerate(sites):
        least = 1 if site.module == "attention" else min(request.round_to, site.units)
        factor = np.float32(request.asked.attention_factor if site.module == "attention" else 1)
        weights = np.float32(1 if request.per_weight else site.weights_per_unit)
        per_weight = request.saliency[site.name] * factor / weights
        values.append(np.sort(per_weight, kind="stable")[: site.units - least])
        owners.append(np.full(values[-1].shape, position))
    order = np.concatenate(owners)[np.argsort(np.concatenate(values), kind="stable")]

    def kept(count: int) -> dict[str, int]:
        lost = _condemned(sites, order, count)
        staying = {site.name: site.units - int(n) for site, n in zip(sites, lost, strict=True)}
        return staying | {site.name: request.rounded(site, staying[site.name]) for site in request.of("mlp")}

    def removed(count: int) -> int:
        remaining = kept(count)
        return sum((site.units - remaining[site.name]) * site.weights_per_unit for site in sites)

    target = request.pruning_ratio * request.total
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if removed(middle) >= target else (middle + 1, high)
    # a whole group may have left in the last step: with it and without, the neurons meet the rest
    tried = []
    for count in (low, max(0, low - 1)):
        result = kept(count)
        of_groups = sum((site.units - result[site.name]) * site.weights_per_unit for site in request.of("attention"))
        result |= _neurons_for(request, request.of("mlp"), target - of_groups)
        reached = sum((site.units - result[site.name]) * site.weights_per_unit for site in sites)
        tried.append((abs(reached - target), reached, result))
    distance, reached, result = min(tried, key=lambda each: each[0])
    largest = max((site.weights_per_unit for site in request.of("mlp")), default=0)
    if distance > request.round_to * largest:
        raise _unreachable(request, reached)
    return result


def _published(request: _Request) -> Keep:
    """Count as the authors' code does: floor counts, ties leave together, a layer's last group stays, no re-solve.

    Source: the authors' Llama/main.py at a6094c9.
    """
    gamma = request.asked.gamma
    rate = request.pruning_ratio * request.total / (request.weights("attention") + gamma * request.weights("mlp"))
    keep: Keep = {}
    shares: dict[Module, float] = {"attention": rate, "mlp": gamma * rate}
    for module, share in shares.items():
        sites = request.of(module)
        values = np.concatenate([request.saliency[site.name] for site in sites])
        count = min(len(values), int(share * len(values) + _COUNT_SLACK))
        threshold = np.sort(values)[count - 1] if count else -np.inf
        for site in sites:
            staying = np.flatnonzero(request.saliency[site.name] > threshold)
            if module == "attention":
                keep[site.name] = staying if len(staying) else np.array([site.units - 1])
            else:
                keep[site.name] = _best(site, request.saliency, request.rounded(site, len(staying)))
    return keep


def _check_one_size(sites: Sequence[Site]) -> None:
    if any(len({site.units for site in sites if site.module == module}) > 1 for module in ("attention", "mlp")):
        raise InputError(
            "scope uniform: expected a model whose layers are all of one size, got layers that differ; use scope global"
        )


def _uniform(
    request: _Request, loadable_kv_groups: Callable[[int], bool], counts: Mapping[str, int] | None = None
) -> Keep:
    groups, layers = request.of("attention"), request.of("mlp")
    _check_one_size(request.sites)
    target = request.pruning_ratio * request.total
    units, size = groups[0].units, layers[0].units
    wanted = units * (1 - request.attention_rate())
    if counts is not None:
        wanted = sum(counts[site.name] for site in groups) / len(groups)
    steps = sorted({min(size, block * request.round_to) for block in range(1, -(-size // request.round_to) + 1)})
    group_weights, neuron_weights = request.weights("attention") / units, request.weights("mlp") / size
    nearest = np.inf
    for kept_groups in sorted(range(1, units + 1), key=lambda kept: (abs(kept - wanted), -kept)):
        if not loadable_kv_groups(kept_groups):
            continue
        of_groups = (units - kept_groups) * group_weights
        kept_neurons = min(steps, key=lambda kept: (abs(of_groups + (size - kept) * neuron_weights - target), -kept))
        removed = of_groups + (size - kept_neurons) * neuron_weights
        if abs(removed - target) <= request.round_to * neuron_weights / 2:
            counts = {site.name: kept_groups for site in groups} | {site.name: kept_neurons for site in layers}
            return {site.name: _best(site, request.saliency, counts[site.name]) for site in request.sites}
        if abs(removed - target) < abs(nearest - target):
            nearest = float(removed)
    raise _unreachable(request, nearest)
