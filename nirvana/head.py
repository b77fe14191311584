"""Everything that the output head does, in chunks of the vocabulary: its logits are never in memory as a whole.

Sums over the vocabulary run over the chunks relative to the largest logit so far, and are rescaled when a larger one
comes. Each function keeps the chunk that it was measured with: another one changes memory, and results by rounding.

What is differentiated here is returned with its gradient at the hidden states that the head reads: neither the logits
of all positions nor their gradient exist at any time.

Source: online softmax (arXiv 1805.02867).
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

VOCAB_CHUNK = 4096
"""Head rows at a time."""
OBJECTIVE_CHUNK = 2048
"""Head rows at a time where a gradient is wanted: 2 × 128 positions of logits take 2 MB in float32."""
WHOLE_CHUNK = 8192
"""Head rows upcast at a time where all logits are wanted."""
POSITION_CHUNK = 128
"""Positions at a time: two blocks of 128 × 4096 logits take 4 MB and stay in cache."""


def soft_capped(logits: Float[Tensor, "*shape"], softcap: float | None) -> Float[Tensor, "*shape"]:
    """Return c · tanh(logits / c), or the logits themselves where the architecture has no cap c."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def through_cap(slopes: Float[Tensor, "*_"], capped: Float[Tensor, "*_"], softcap: float | None) -> Float[Tensor, "*_"]:
    """Carry a gradient at capped logits back to the logits: d(c · tanh(z / c))/dz = 1 − tanh²(z / c)."""
    return slopes if softcap is None else slopes * (1 - (capped / softcap) ** 2)


def vocabulary_chunks(
    head: Float[Tensor, "vocab hidden"], device: torch.device, size: int
) -> Iterator[tuple[int, Float[Tensor, "_ hidden"]]]:
    """Yield the first row's number and the rows of each chunk, in float32 on the device that computes."""
    for start in range(0, head.shape[0], size):
        yield start, head[start : start + size].to(device=device, dtype=torch.float32)


def head_logits(
    hidden: Float[Tensor, "positions hidden"], head: Float[Tensor, "vocab hidden"], softcap: float | None = None
) -> Float[Tensor, "positions vocab"]:
    """Return all logits of a few positions."""
    chunks = vocabulary_chunks(head, hidden.device, WHOLE_CHUNK)
    return torch.cat([soft_capped(hidden @ rows.T, softcap) for _, rows in chunks], dim=1)


@torch.no_grad()
def likeliest_tokens(
    hidden: Float[Tensor, "positions hidden"], head: Float[Tensor, "vocab hidden"]
) -> Int[Tensor, " positions"]:
    """Return the token with the largest logit at each position; a cap would keep their order."""
    best = torch.full(hidden.shape[:1], -torch.inf, device=hidden.device)
    likeliest = torch.zeros(hidden.shape[:1], dtype=torch.int64, device=hidden.device)
    for start, rows in vocabulary_chunks(head, hidden.device, VOCAB_CHUNK):
        highest, token = (hidden @ rows.T).max(dim=1)
        likeliest = torch.where(highest > best, token + start, likeliest)
        best = torch.maximum(best, highest)
    return likeliest


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
    for start, rows in vocabulary_chunks(head, hidden.device, VOCAB_CHUNK):
        for first in range(0, len(targets), POSITION_CHUNK):
            block = slice(first, first + POSITION_CHUNK)
            logits = soft_capped(hidden[block] @ rows.T, softcap)
            normaliser[block] = torch.logaddexp(normaliser[block], torch.logsumexp(logits, dim=1).double())
            column = targets[block] - start
            here = (column >= 0) & (column < len(rows))
            picked = logits.gather(1, column.clamp(0, len(rows) - 1)[:, None]).squeeze(1).double()
            chosen[block] = torch.where(here, picked, chosen[block])
    return normaliser - chosen


@torch.no_grad()
def head_divergence(
    dense: Float[Tensor, "positions hidden"],
    pruned: Float[Tensor, "positions hidden"],
    head: Float[Tensor, "vocab hidden"],
    softcap: float | None = None,
) -> float:
    """Return the mean KL between the distributions that one head gives for two sets of hidden states.

    With z, y the dense and pruned logits: KL = Σ_v P(v)·(z_v − y_v) − logsumexp(z) + logsumexp(y).

    Returns:
        Nats a position. Row sums are kept in float64.
    """
    blocks = [slice(start, start + POSITION_CHUNK) for start in range(0, dense.shape[0], POSITION_CHUNK)]
    states = [_RunningKL(dense[block], pruned[block], softcap) for block in blocks]
    for _, rows in vocabulary_chunks(head, dense.device, VOCAB_CHUNK):
        for state in states:
            state.add(rows)
    return float(torch.cat([state.result() for state in states]).mean())


class _RunningKL:
    """KL of a block of positions over the vocabulary chunks seen so far."""

    def __init__(self, dense: Tensor, pruned: Tensor, softcap: float | None):
        self._dense, self._pruned, self._softcap = dense, pruned, softcap
        # The pruned distribution needs only its normaliser, the dense one also Σ exp(z − peak)·(z − y).
        zeros = torch.zeros(dense.shape[0], dtype=torch.float64, device=dense.device)
        lowest = torch.full_like(zeros, -torch.inf)
        self._dense_peak, self._dense_sum, self._difference = lowest, zeros, zeros
        self._pruned_peak, self._pruned_sum = lowest, zeros

    def add(self, rows: Tensor) -> None:
        z, y = (soft_capped(hidden @ rows.T, self._softcap) for hidden in (self._dense, self._pruned))
        peak = torch.maximum(self._dense_peak, z.amax(dim=1).double())
        weight = torch.exp(z - peak.float()[:, None])
        # what was summed relative to the old peak, rescaled to the new one
        shrink = torch.exp(self._dense_peak - peak.float().double())
        self._dense_sum = self._dense_sum * shrink + weight.sum(dim=1, dtype=torch.float64)
        z -= y
        self._difference = self._difference * shrink + torch.linalg.vecdot(weight, z).double()
        self._dense_peak = peak.float().double()
        peak = torch.maximum(self._pruned_peak, y.amax(dim=1).double())
        y -= peak.float()[:, None]
        self._pruned_sum = self._pruned_sum * torch.exp(self._pruned_peak - peak) + y.exp_().sum(dim=1).double()
        self._pruned_peak = peak

    def result(self) -> Float[Tensor, " positions"]:
        dense_normaliser = self._dense_peak + torch.log(self._dense_sum)
        pruned_normaliser = self._pruned_peak + torch.log(self._pruned_sum)
        return self._difference / self._dense_sum - dense_normaliser + pruned_normaliser


def head_maxima(
    normalised: Float[Tensor, "batch tokens hidden"],
    head: Float[Tensor, "vocab hidden"],
    vocab_chunk: int = OBJECTIVE_CHUNK,
    softcap: float | None = None,
) -> tuple[float, Float[Tensor, "batch tokens hidden"]]:
    """Return Σ_b Σ_v max_t z[b,t,v] and its gradient at the hidden states that the head reads.

    The gradient is the sum of the head's rows at their argmax positions; `max` picks one index where `amax` would
    split the gradient over ties.
    """
    total = torch.zeros((), dtype=torch.float64, device=normalised.device)
    gradient = torch.zeros_like(normalised)
    for _, rows in vocabulary_chunks(head, normalised.device, vocab_chunk):
        for index in range(normalised.shape[0]):
            logits = normalised[index] @ rows.T
            largest = logits.max(dim=0)
            values = soft_capped(largest.values, softcap)  # tanh keeps the order: only the value and its slope change
            total += values.sum(dtype=torch.float64)
            gradient[index].index_add_(0, largest.indices, through_cap(rows, values[:, None], softcap))
    return float(total), gradient


def head_loss(
    normalised: Float[Tensor, "positions hidden"],
    targets: Int[Tensor, " positions"],
    head: Float[Tensor, "vocab hidden"],
    vocab_chunk: int = OBJECTIVE_CHUNK,
    softcap: float | None = None,
) -> tuple[float, Float[Tensor, "positions hidden"]]:
    """Return Σ −log P(target) and its gradient at the hidden states that the head reads."""
    peak = torch.full(targets.shape, -torch.inf, device=normalised.device)
    exponentials = torch.zeros(targets.shape, dtype=torch.float64, device=normalised.device)
    chosen = torch.zeros_like(exponentials)
    expected, observed = torch.zeros_like(normalised), torch.zeros_like(normalised)
    for start, rows in vocabulary_chunks(head, normalised.device, vocab_chunk):
        logits = soft_capped(normalised @ rows.T, softcap)
        here = torch.nonzero((targets >= start) & (targets < start + len(rows)))[:, 0]
        columns = targets[here] - start
        picked, picked_rows = logits[here, columns], rows[columns]
        higher = torch.maximum(peak, logits.amax(dim=1))
        weights, shrink = torch.exp(logits - higher[:, None]), torch.exp(peak - higher)
        exponentials = exponentials * shrink + weights.sum(dim=1, dtype=torch.float64)
        expected = expected * shrink[:, None] + through_cap(weights, logits, softcap) @ rows
        chosen[here], observed[here] = picked.double(), through_cap(picked_rows, picked[:, None], softcap)
        peak = higher
    losses = peak + torch.log(exponentials) - chosen
    return float(losses.sum()), expected / exponentials[:, None].float() - observed


@torch.no_grad()
def sampled_label_gradients(
    normalised: Float[Tensor, "batch tokens hidden"],
    head: Float[Tensor, "vocab hidden"],
    uniforms: Float[Tensor, "draws batch tokens"],
    softcap: float | None = None,
) -> Float[Tensor, "draws batch tokens hidden"]:
    """Return ∂ℓ/∂(what the head reads), a draw each, where each position's label is drawn from the head's distribution.

    The logits are made twice for all draws, a chunk of the vocabulary at a time: for their normaliser, then for the
    probabilities. The label is where the cumulative probability passes the position's uniform number.
    """
    gradients = normalised.new_empty(len(uniforms), *normalised.shape)
    for index, hidden in enumerate(normalised):
        chunks = vocabulary_chunks(head, hidden.device, VOCAB_CHUNK)
        parts = [torch.logsumexp(soft_capped(hidden @ rows.T, softcap).double(), dim=1) for _, rows in chunks]
        normaliser = torch.logsumexp(torch.stack(parts), dim=0)
        below = torch.zeros_like(normaliser)
        # the last label must be reachable although the probabilities add up to 1 only nearly
        targets = uniforms[:, index].double().clamp(max=1 - 1e-9)
        expected, labels = torch.zeros_like(hidden), torch.zeros_like(gradients[:, index])
        for start, rows in vocabulary_chunks(head, hidden.device, VOCAB_CHUNK):
            logits = soft_capped(hidden @ rows.T, softcap)
            probabilities = torch.exp(logits.double() - normaliser[:, None])
            cumulative = below[:, None] + probabilities.cumsum(dim=1)
            last = start + len(rows) == head.shape[0]
            for target, at_label in zip(targets, labels, strict=True):
                here = ((below <= target) & ((cumulative[:, -1] > target) | last)).nonzero().squeeze(1)
                passed = torch.searchsorted(cumulative[here], target[here, None], right=True).squeeze(1)
                label = passed.clamp(max=len(rows) - 1)
                one = torch.ones_like(here, dtype=torch.float32)
                at_label[here] = through_cap(one, logits[here, label], softcap)[:, None] * rows[label]
            expected += through_cap(probabilities.float(), logits, softcap) @ rows
            below = cumulative[:, -1]
        gradients[:, index] = expected - labels
    return gradients
