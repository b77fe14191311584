"""Text that a language model writes itself, to fit on what it knows rather than on what one corpus speaks of.

Each sequence begins with a token drawn from the vocabulary, behind BOS where the model was trained with one, and goes
on by sampling from the model's own distribution, temperature 1, over the tokens that may be written.

Sources: LLM-QAT (arXiv 2305.17888), data from a random first token on; Self-calibration for Language Model
Quantization and Pruning (arXiv 2410.17170). Both sharpen the distribution; here it is the one that is to be kept.
"""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nirvana.errors import InputError
from nirvana.walk import SEQUENCES_AT_ONCE


@torch.no_grad()
def generate(
    model: Any,
    sequences: int,
    length: int,
    tokens: Collection[int],
    seed: int = 0,
    bos: int | None = None,
    on_token: Callable[[int], None] = lambda count: None,
) -> Int[Tensor, "sequences length"]:
    """Let a causal language model write.

    Args:
        model: As transformers loads it, in evaluation mode.
        sequences: How many to write.
        length: Tokens a sequence, BOS and the drawn first one included.
        tokens: Ids that may be written, such as those of the tokenizer without special ones.
        seed: Of every draw: the same text each time, on one kind of device. Each sequence has draws of its own, so more
            sequences begin with the same ones, but for what rounding makes of them.
        bos: What every sequence begins with; None: the drawn token is the first.
        on_token: Called with how many sequences each step has made longer, for progress.

    Returns:
        int64 token ids on the CPU.

    Raises:
        InputError: If no token may be written, or the model's logits are not finite.
    """
    allowed = torch.tensor(sorted(tokens), dtype=torch.int64)
    if not len(allowed):
        raise InputError("generated text: expected tokens that may be written, got none; check the tokenizer")
    written = []
    for start in range(0, sequences, SEQUENCES_AT_ONCE):
        rows = min(SEQUENCES_AT_ONCE, sequences - start)
        draws = torch.from_numpy(
            np.stack([np.random.default_rng((seed, row)).random(length) for row in range(start, start + rows)])
        )
        ids, cache = [allowed[(draws[:, :1] * len(allowed)).long()]], None
        if bos is not None:
            ids.insert(0, torch.full_like(ids[0], bos))
        on_token(rows * len(ids))
        unread = torch.cat(ids, dim=1)
        while len(ids) < length:
            out = model(input_ids=unread.to(model.device), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits = out.logits[:, -1].float().cpu()[:, allowed]
            if not torch.isfinite(logits).all():
                raise InputError("generated text: expected finite logits, got others; check the model's weights")
            unread = allowed[_drawn(logits.softmax(-1), draws[:, len(ids), None])]
            ids.append(unread)
            on_token(rows)
        written.append(torch.cat(ids, dim=1)[:, :length])
    return torch.cat(written) if written else torch.empty((0, length), dtype=torch.int64)


def _drawn(probabilities: Float[Tensor, "rows tokens"], draws: Float[Tensor, "rows 1"]) -> Int[Tensor, "rows 1"]:
    """Return for each row the first token by which the probabilities have added up to more than the draw."""
    cumulated = probabilities.double().cumsum(-1)
    found = torch.searchsorted(cumulated, draws * cumulated[:, -1:], right=True)
    return found.clamp(max=probabilities.shape[1] - 1)
