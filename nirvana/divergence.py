"""KL(dense‖pruned) of a plan, without building the pruned model.

The dense model's hidden states on the held-out text are computed once and kept (tokens · hidden, where its
log-probabilities would take tokens · vocabulary). For a plan, each layer runs with its weights sliced for that one
call; then both heads are read in chunks of the vocabulary with running log-sum-exps.

Source: NIRVANA (arXiv 2509.14230), calibration selection: the mean over positions of
Σ_v P_dense (log P_dense − log P_pruned).
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from nirvana.architectures.architecture import Streams
from nirvana.errors import InputError
from nirvana.head import head_divergence
from nirvana.slicing import Slicer
from nirvana.walk import FORWARD_TOKENS, Hidden, Ids, Stack, as_streams, microbatches, part_of, walk_forward


@torch.no_grad()
def dense_hidden_states(stack: Stack, ids: Ids, on_layer: Callable[[int], None] = lambda layer: None) -> Hidden:
    """Return what the dense model's head reads at every position of the held-out sequences.

    Raises:
        InputError: If a token id is out of range.
    """
    stack.check_ids(ids)
    parts = _embedded(stack, ids)
    for layer, weights in stack.layers(range(stack.num_layers)):
        parts = walk_forward(stack, parts, layer, weights)
        on_layer(layer)
    return torch.cat([stack.head_input(part) for part in parts])


def _embedded(stack: Stack, ids: Ids) -> list[Streams]:
    """Return what enters layer 0, in microbatches of about `FORWARD_TOKENS` tokens: small at any length."""
    sequences, length = as_streams(ids)[0].shape
    return [stack.embed(part_of(ids, rows)) for rows in microbatches(sequences, max(1, FORWARD_TOKENS // length))]


@torch.no_grad()
def pruned_hidden_states(
    stack: Stack,
    keep: Mapping[str, NDArray[np.int64]],
    ids: Ids,
    updates: Mapping[str, Tensor] | None = None,
) -> Hidden:
    """Return what the pruned model's head would read, each layer sliced for its own call only.

    Args:
        keep: Kept units by site name.
        ids: Sequences.
        updates: Parameters that are not what slicing leaves, by name: those that compensation solved for, and biases of
            linear layers that have none in the dense model.
    """
    slicer = Slicer(stack.architecture.sites(), keep)
    kept_units = {name: len(indices) for name, indices in keep.items()}
    parts = _embedded(stack, ids)
    for layer, weights in stack.layers(range(stack.num_layers)):
        # taken out one by one: the dense layer goes as the sliced one comes
        sliced = {name: slicer.apply(name, weights.pop(name)) for name in list(weights)}
        if updates is not None:
            prefix = stack.architecture.layer_prefix(layer)
            sliced |= {name: value.to(stack.device) for name, value in updates.items() if name.startswith(prefix)}
        fused = stack.architecture.fuse(layer, sliced)
        parts = [stack.run_layer(layer, part, fused, kept_units) for part in parts]
        del sliced, fused
    return torch.cat([stack.head_input(part, updates) for part in parts])


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
        dense: `dense_hidden_states` of the same sequences.
        updates: See `pruned_hidden_states`.

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
    pruned = pruned_hidden_states(stack, keep, ids, updates)
    return head_divergence(
        dense.flatten(0, 1), pruned.flatten(0, 1), stack.head_weight(), stack.architecture.logit_softcap
    )
