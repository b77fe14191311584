"""NIRVANA as published: the sum of |W · ∂f/∂W| over all weights that a unit owns.

The method's own form of f, and what else the score means: `nirvana.saliency`.

Source: NIRVANA (arXiv 2509.14230), unit saliency.
"""

from jaxtyping import Float
from torch import Tensor

from nirvana.methods.method import Scoring
from nirvana.saliency import channel_saliency, unit_saliency
from nirvana.walk import Ids, Stack


def nirvana(stack: Stack, ids: Ids, scoring: Scoring) -> dict[str, Float[Tensor, " units"]]:
    """Return Σ|W · ∂f/∂W| of each unit."""
    sums = channel_saliency(stack, ids, scoring.microbatch, scoring.on_layer, scoring.memory).sums
    return unit_saliency(stack.architecture.sites(), sums)
