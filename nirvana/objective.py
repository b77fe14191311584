"""The scalars that saliency differentiates: a value of the head (`nirvana.head`), carried back through the last norm.

NIRVANA's f = 1/(B·V) · Σ_b Σ_v max_t z[b,t,v] needs, for each sequence and vocabulary entry, only the position of the
largest logit. The next-token loss, which baselines differentiate, needs the softmax over the vocabulary.

Source: NIRVANA (arXiv 2509.14230), objective.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nirvana.architectures.architecture import Streams
from nirvana.errors import InputError
from nirvana.head import OBJECTIVE_CHUNK, head_loss, head_maxima
from nirvana.walk import Hidden, Ids, Stack, as_streams

Objective = Callable[[Stack, Streams, Ids, int], tuple[float, Hidden]]
"""A scalar that is a sum over the sequences of a calibration set, so that microbatches add up to it.

From a microbatch's streams behind the last layer, its token ids and B, the sequences of the whole set: the
microbatch's share, and its gradient at the last stream, before the final norm."""


def mean_largest_logit(
    stack: Stack, streams: Streams, ids: Ids, num_sequences: int, vocab_chunk: int = OBJECTIVE_CHUNK
) -> tuple[float, Hidden]:
    """Return NIRVANA's objective f (see `Objective`); it does not look at the token ids.

    Args:
        vocab_chunk: Rows of the head at a time; changes memory, not the result beyond rounding.

    Source: NIRVANA (arXiv 2509.14230), objective.
    """
    scale = 1.0 / (num_sequences * stack.architecture.vocab_size)

    def at_head(normalised: Hidden) -> tuple[float, Tensor]:
        return head_maxima(normalised, stack.head_weight(), vocab_chunk, stack.architecture.logit_softcap)

    return _through_norm(stack, streams, scale, at_head)


def next_token_loss(
    stack: Stack, streams: Streams, ids: Ids, num_sequences: int, vocab_chunk: int = OBJECTIVE_CHUNK
) -> tuple[float, Hidden]:
    """Return the mean negative log-likelihood of each token but the first, in nats (see `Objective`).

    An encoder-decoder predicts the tokens that its decoder reads, each at the position before it.

    Args:
        vocab_chunk: Rows of the head at a time; changes memory, not the result beyond rounding.

    Raises:
        InputError: If the sequences have one token only.
    """
    read = as_streams(ids)[-1]
    if read.shape[1] < 2:
        raise InputError(f"expected sequences of at least 2 tokens, got {read.shape[1]}; nothing would be predicted")
    targets = read[:, 1:].flatten()

    def at_head(normalised: Hidden) -> tuple[float, Tensor]:
        predicting = normalised[:, :-1].flatten(0, 1)
        softcap = stack.architecture.logit_softcap
        value, slopes = head_loss(predicting, targets.to(predicting.device), stack.head_weight(), vocab_chunk, softcap)
        gradient = torch.zeros_like(normalised)  # the last position predicts nothing
        gradient[:, :-1] = slopes.view_as(gradient[:, :-1])
        return value, gradient

    return _through_norm(stack, streams, 1.0 / (num_sequences * (read.shape[1] - 1)), at_head)


def _through_norm(
    stack: Stack, streams: Streams, scale: float, at_head: Callable[[Tensor], tuple[float, Tensor]]
) -> tuple[float, Tensor]:
    """Scale what the head gives and carry its gradient back through the final norm."""
    leaf = streams[-1].detach().requires_grad_()
    with torch.enable_grad():
        normalised = stack.head_input((*streams[:-1], leaf))
    value, gradient = at_head(normalised.detach())
    (at_hidden,) = torch.autograd.grad(normalised, leaf, gradient * scale)
    return value * scale, at_hidden
