"""The scalars that saliency differentiates, without ever holding their logits.

NIRVANA's f = 1/(B·V) · Σ_b Σ_v max_t z[b,t,v] needs, for each sequence and vocabulary entry, only the position of the
largest logit. Going through the vocabulary in chunks, its gradient with respect to the normalised hidden states is the
sum of the head's rows at their argmax positions: neither the B·T·V logits nor their gradient exist at any time.

The next-token loss, which its rivals differentiate, needs the softmax over the vocabulary: sums of exp(z) and of
exp(z) · row run over the chunks relative to the largest logit so far, and are rescaled when a larger one comes.

Source: NIRVANA (arXiv 2509.14230), objective; `max` picks one index where `amax` would split the gradient over ties.
The running sums: online softmax (arXiv 1805.02867).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nirvana.architectures.architecture import Streams
from nirvana.errors import InputError
from nirvana.walk import Hidden, Ids, Stack, as_streams

VOCAB_CHUNK = 2048
"""Head rows at a time: 2 × 128 positions of logits for a chunk take 2 MB in float32."""


Objective = Callable[[Stack, Streams, Ids, int], tuple[float, Hidden]]
"""A scalar that is a sum over the sequences of a calibration set, so that microbatches add up to it.

From a microbatch's streams behind the last layer, its token ids and B, the sequences of the whole set: the
microbatch's share, and its gradient at the last stream, before the final norm."""


def mean_largest_logit(
    stack: Stack, streams: Streams, ids: Ids, num_sequences: int, vocab_chunk: int = VOCAB_CHUNK
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
    stack: Stack, streams: Streams, ids: Ids, num_sequences: int, vocab_chunk: int = VOCAB_CHUNK
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


def head_maxima(
    normalised: Hidden,
    head: Float[Tensor, "vocab hidden"],
    vocab_chunk: int = VOCAB_CHUNK,
    softcap: float | None = None,
) -> tuple[float, Float[Tensor, "batch tokens hidden"]]:
    """Return Σ_b Σ_v max_t z[b,t,v] and its gradient at the hidden states that the head reads."""
    total = torch.zeros((), dtype=torch.float64, device=normalised.device)
    gradient = torch.zeros_like(normalised)
    for start in range(0, head.shape[0], vocab_chunk):
        rows = head[start : start + vocab_chunk].to(device=normalised.device, dtype=torch.float32)
        for index in range(normalised.shape[0]):
            logits = normalised[index] @ rows.T
            largest = logits.max(dim=0)
            values, slopes = largest.values, rows
            if softcap is not None:  # tanh keeps the order: only the value and its slope change
                values = softcap * torch.tanh(values / softcap)
                slopes = rows * (1 - (values / softcap) ** 2)[:, None]
            total += values.sum(dtype=torch.float64)
            gradient[index].index_add_(0, largest.indices, slopes)
    return float(total), gradient


def head_loss(
    normalised: Float[Tensor, "positions hidden"],
    targets: Int[Tensor, " positions"],
    head: Float[Tensor, "vocab hidden"],
    vocab_chunk: int = VOCAB_CHUNK,
    softcap: float | None = None,
) -> tuple[float, Float[Tensor, "positions hidden"]]:
    """Return Σ −log P(target) and its gradient at the hidden states that the head reads."""
    peak = torch.full(targets.shape, -torch.inf, device=normalised.device)
    exponentials = torch.zeros(targets.shape, dtype=torch.float64, device=normalised.device)
    chosen = torch.zeros_like(exponentials)
    expected, observed = torch.zeros_like(normalised), torch.zeros_like(normalised)
    for start in range(0, head.shape[0], vocab_chunk):
        rows = head[start : start + vocab_chunk].to(device=normalised.device, dtype=torch.float32)
        logits = normalised @ rows.T
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        here = torch.nonzero((targets >= start) & (targets < start + len(rows)))[:, 0]
        columns = targets[here] - start
        picked, picked_rows = logits[here, columns], rows[columns]
        higher = torch.maximum(peak, logits.amax(dim=1))
        weights, shrink = torch.exp(logits - higher[:, None]), torch.exp(peak - higher)
        exponentials = exponentials * shrink + weights.sum(dim=1, dtype=torch.float64)
        if softcap is not None:
            weights *= 1 - (logits / softcap) ** 2
            picked_rows = picked_rows * (1 - (picked / softcap) ** 2)[:, None]
        expected = expected * shrink[:, None] + weights @ rows
        chosen[here], observed[here] = picked.double(), picked_rows
        peak = higher
    losses = peak + torch.log(exponentials) - chosen
    return float(losses.sum()), expected / exponentials[:, None].float() - observed
