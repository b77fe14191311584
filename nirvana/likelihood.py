"""Negative log-likelihood of tokens from what the head reads: log-sum-exps run over chunks of the vocabulary."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nirvana.divergence import POSITION_CHUNK, VOCAB_CHUNK


@torch.no_grad()
def token_losses(
    hidden: Float[Tensor, "positions hidden"],
    targets: Int[Tensor, " positions"],
    head: Float[Tensor, "vocab hidden"],
    softcap: float | None = None,
) -> Float[Tensor, " positions"]:
    """Return −log P(target) of each position, in float64 nats."""
    normaliser = torch.full(targets.shape, -torch.inf, dtype=torch.float64, device=hidden.device)
    chosen = torch.zeros_like(normaliser)
    for start in range(0, head.shape[0], VOCAB_CHUNK):
        rows = head[start : start + VOCAB_CHUNK].to(device=hidden.device, dtype=torch.float32)
        for first in range(0, len(targets), POSITION_CHUNK):
            block = slice(first, first + POSITION_CHUNK)
            logits = hidden[block] @ rows.T
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            normaliser[block] = torch.logaddexp(normaliser[block], torch.logsumexp(logits, dim=1).double())
            column = targets[block] - start
            here = (column >= 0) & (column < len(rows))
            picked = logits.gather(1, column.clamp(0, len(rows) - 1)[:, None]).squeeze(1).double()
            chosen[block] = torch.where(here, picked, chosen[block])
    return normaliser - chosen
