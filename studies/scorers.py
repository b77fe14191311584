"""Our own two scorers behind the interface of the rivals: NIRVANA as published, and mask Fisher.

A module of their own: what is cached of them depends on this code, not on the rivals'.
"""

from jaxtyping import Float
from torch import Tensor

from nirvana.fisher import mask_fisher
from nirvana.methods import Scoring
from nirvana.saliency import channel_saliency, unit_saliency
from nirvana.walk import Ids, Stack


def nirvana(stack: Stack, ids: Ids, scoring: Scoring) -> dict[str, Float[Tensor, " units"]]:
    """Return Σ|W · ∂f/∂W| of each unit."""
    sums = channel_saliency(stack, ids, scoring.microbatch, scoring.on_layer, scoring.memory).sums
    return unit_saliency(stack.architecture.sites(), sums)


def fisher(stack: Stack, ids: Ids, scoring: Scoring) -> dict[str, Float[Tensor, " units"]]:
    """Return ½ F_u of each unit's mask, in nats a token."""
    return mask_fisher(stack, ids, scoring.microbatch, seed=scoring.seed, on_layer=scoring.on_layer)
