"""Magnitude: the sum of |W| over all weights that a unit owns.

Source: Han et al. (arXiv 1506.02626) for single weights; for units as the published NIRVANA code does it
(iDEA-iSAIL-Lab-UIUC/NIRVANA, Llama/main.py at a6094c9, `--prune_type magnitude`): NIRVANA's own sums, ranking and
gamma, with |W| in place of |W · gradient|.

Deviations: the counts are those of `nirvana.allocation` (exact, the best KV group of a layer stays), not the code's.
FLAP's repository has another one, `mag_sp`: column norms of the output projections, the same share in every layer.
"""

from jaxtyping import Float
from torch import Tensor

from nirvana.methods.method import Scoring
from nirvana.saliency import channel_key, unit_saliency, weight_slots_by_layer
from nirvana.walk import Ids, Stack


def magnitude(stack: Stack, ids: Ids, scoring: Scoring) -> dict[str, Float[Tensor, " units"]]:
    """Return Σ|W| of each unit; the text is not read."""
    sites = stack.architecture.sites()
    slots, sums = weight_slots_by_layer(sites), {}
    for layer, weights in stack.layers(range(stack.num_layers)):
        for slot in slots[layer]:
            others = [dim for dim in range(weights[slot.parameter].ndim) if dim != slot.dim]
            sums[channel_key(slot)] = weights[slot.parameter].abs().sum(dim=others).cpu()
        scoring.on_layer(layer)
    return unit_saliency(sites, sums)
