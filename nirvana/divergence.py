"""KL(dense‖pruned) of a plan, without building the pruned model.

The dense model's hidden states on the held-out text are computed once and kept (tokens · hidden, where its
log-probabilities would take tokens · vocabulary). For a plan, each layer runs with its weights sliced for that one
call; then both heads are read in chunks of the vocabulary with running log-sum-exps.

Source: NIRVANA (arXiv 2509.14230), calibration selection: the mean over positions of
Σ_v P_dense (log P_dense − log P_pruned).
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from nirvana.errors import InputError
from nirvana.head import head_divergence
from nirvana.walk import Ids, Stack, as_streams, final_hidden_states


def kl_divergence(
    stack: Stack,
    keep: Mapping[str, NDArray[np.int64]],
    ids: Ids,
    dense: Float[Tensor, "_ _ hidden"],
    updates: Mapping[str, Tensor] | None = None,
) -> float:
    """Return KL(dense‖pruned) on held-out sequences.

    Args:
        keep: Kept units by site name.
        ids: Held-out sequences.
        dense: `final_hidden_states` of the dense model on the same sequences.
        updates: See `final_hidden_states`.

    Returns:
        Mean over all positions, in nats a token.

    Raises:
        InputError: If a token id is out of range, or `dense` is of other sequences.

    Source: NIRVANA (arXiv 2509.14230), calibration selection.
    """
    stack.check_ids(ids)
    positions = as_streams(ids)[-1].shape
    if dense.shape[:2] != positions:
        raise InputError(
            f"expected the dense hidden states of {tuple(positions)} tokens, got those of {tuple(dense.shape[:2])}; "
            "compute them on the same sequences"
        )
    pruned = final_hidden_states(stack, ids, keep, updates)
    return head_divergence(
        dense.flatten(0, 1), pruned.flatten(0, 1), stack.head_weight(), stack.architecture.logit_softcap
    )
