"""The allocation of LLM-Pruner and Wanda-sp: every layer loses the same share, each layer's best units stay.

Both codes round the number of heads that a layer loses down (`int(ratio * heads)`). With few KV groups that decides:
of SmolLM2's three, a share of 0.2 takes none, where the nearest count would take a third of attention. Neurons then
make up for the rest, so that the budget of every other method is met; the codes miss it.

Source: LLM-Pruner (arXiv 2305.11627), local pruning, LLMPruner/torch_pruning/pruner/algorithms/metapruner.py,
`prune_local`; FLAP's repository, lib/prune.py, `prune_wanda_sp`. That neurons meet the budget is ours.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from nirvana.allocation import Keep, allocate, module_rates
from nirvana.architectures.site import Site
from nirvana.errors import InputError

_LAYERS = 32
"""Depth of the model that the paper of a method with protected layers speaks of: LLaMA-7B's."""
_COUNT_SLACK = 1e-6
"""Added before rounding a count down, as in `nirvana.allocation`."""


def protected_layers(of_32: tuple[int, int], num_layers: int) -> tuple[int, int]:
    """Return how many first and last layers lose nothing, from what that is of 32: the same share, rounded."""
    first, last = ((count * num_layers + _LAYERS // 2) // _LAYERS for count in of_32)
    return first, last


def allocate_same_share(
    sites: Sequence[Site],
    saliency: Mapping[str, NDArray[np.float32]],
    pruning_ratio: float,
    gamma: float = 1.0,
    round_to: int = 8,
    protected: tuple[int, int] = (0, 0),
) -> Keep:
    """Return which units stay.

    Args:
        sites: Where units live, in walk order.
        saliency: Unit saliency by site name.
        pruning_ratio: Share of all block weights that leaves, protected layers included.
        gamma: MLP rate divided by attention rate.
        round_to: Kept neurons of a layer are a multiple of this (or all of them).
        protected: First and last layers that lose nothing; the others lose more for it.

    Raises:
        InputError: If the ratio cannot be reached, the layers are not all of one size, or none is left to prune.
    """
    layers = sorted({site.layer for site in sites})
    inner_layers = layers[protected[0] : len(layers) - protected[1]]
    # an encoder-decoder's layers need not keep the same heads here
    inner = [replace(site, aligned_with=None) for site in sites if site.layer in inner_layers]
    if not inner:
        raise InputError(f"expected layers beside the {sum(protected)} protected ones, got {len(layers)} in all")
    share = pruning_ratio * sum(site.weights for site in sites) / sum(site.weights for site in inner)
    if share >= 1:
        raise InputError(
            f"pruning_ratio: {pruning_ratio} cannot be reached with {sum(protected)} of {len(layers)} layers protected"
            f"; ask for less than {pruning_ratio / share:.4f}"
        )
    weights = {module: sum(site.weights for site in inner if site.module == module) for module in ("attention", "mlp")}
    rate = module_rates(weights, None, share, gamma)["attention"]
    groups = next(site.units for site in inner if site.module == "attention")
    least = groups - math.floor(min(rate, 1.0) * groups + _COUNT_SLACK)
    keep = {site.name: np.arange(site.units, dtype=np.int64) for site in sites}
    return keep | allocate(
        inner, saliency, share, gamma, round_to, scope="uniform", loadable_kv_groups=lambda kept: kept >= least
    )
