"""Mask Fisher: ½ F_u of each unit's mask, in nats a token; what that is, `nirvana.fisher` says.

Source: Kwon et al. 2022 (arXiv 2204.09656).
"""

from jaxtyping import Float
from torch import Tensor

from nirvana.fisher import mask_fisher
from nirvana.methods.method import Scoring
from nirvana.walk import Ids, Stack


def fisher(stack: Stack, ids: Ids, scoring: Scoring) -> dict[str, Float[Tensor, " units"]]:
    """Return ½ F_u of each unit's mask."""
    return mask_fisher(stack, ids, scoring.microbatch, scoring.draws, scoring.seed, on_layer=scoring.on_layer)
