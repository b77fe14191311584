"""Random: every unit draws its score; what any other method has to beat.

Source: the usual control; no paper. Scores are uniform in [0, 1), drawn site by site in walk order with
`Scoring.seed`: the same seed keeps the same units on every machine. KV groups and neurons lose the same share
(`gamma` 1), ranked over all layers, so layers lose about equally much.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nirvana.methods.method import Scoring
from nirvana.walk import Ids, Stack


def random(stack: Stack, ids: Ids, scoring: Scoring) -> dict[str, Float[Tensor, " units"]]:
    """Return uniform random scores; neither weights nor text are read."""
    generator = torch.Generator().manual_seed(scoring.seed)
    return {site.name: torch.rand(site.units, generator=generator) for site in stack.architecture.sites()}
