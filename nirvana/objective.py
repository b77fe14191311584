"""The scalar that NIRVANA differentiates, without ever holding its logits.

f = 1/(B·V) · Σ_b Σ_v max_t z[b,t,v] needs, for each sequence and vocabulary entry, only the position of the largest
logit. Going through the vocabulary in chunks, its gradient with respect to the normalised hidden states is the sum of
the head's rows at their argmax positions: neither the B·T·V logits nor their gradient exist at any time.

Source: NIRVANA (arXiv 2509.14230), objective; `max` picks one index where `amax` would split the gradient over ties.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nirvana.architectures.architecture import Streams
from nirvana.walk import Hidden, Stack

VOCAB_CHUNK = 2048
"""Head rows at a time: 2 × 128 positions of logits for a chunk take 2 MB in float32."""


def objective_and_gradient(
    stack: Stack, streams: Streams, num_sequences: int, vocab_chunk: int = VOCAB_CHUNK
) -> tuple[float, Hidden]:
    """Return the objective's share of a microbatch and its gradient at the last stream, before the final norm.

    Args:
        streams: What leaves the last layer for the microbatch's sequences.
        num_sequences: B, the sequences of the whole calibration set.
        vocab_chunk: Rows of the head at a time; changes memory, not the result beyond rounding.

    Returns:
        The summand of f that belongs to these sequences, and ∂f/∂(last stream).

    Source: NIRVANA (arXiv 2509.14230), objective.
    """
    leaf = streams[-1].detach().requires_grad_()
    with torch.enable_grad():
        normalised = stack.head_input((*streams[:-1], leaf))
    softcap = stack.architecture.logit_softcap
    value, gradient = head_maxima(normalised.detach(), stack.head_weight(), vocab_chunk, softcap)
    scale = 1.0 / (num_sequences * stack.architecture.vocab_size)
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
