"""LM loss: NIRVANA's sums, ranking and gamma, with the gradient of the next-token loss in place of its objective.

A control rather than a published method: it tells what the objective of NIRVANA adds to a plain first-order Taylor
score.

Source: Molchanov et al. (arXiv 1906.10771), |W · ∂loss/∂W|; the rest as NIRVANA (arXiv 2509.14230).
"""

from jaxtyping import Float
from torch import Tensor

from nirvana.methods.method import Scoring
from nirvana.objective import next_token_loss
from nirvana.saliency import channel_saliency, unit_saliency
from nirvana.walk import Ids, Stack


def lm_loss(stack: Stack, ids: Ids, scoring: Scoring) -> dict[str, Float[Tensor, " units"]]:
    """Return Σ|W · ∂loss/∂W| of each unit, the absolute value after the gradient of the whole set is summed."""
    sums = channel_saliency(stack, ids, scoring.microbatch, scoring.on_layer, scoring.memory, next_token_loss).sums
    return unit_saliency(stack.architecture.sites(), sums)
