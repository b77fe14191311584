"""The two things that are timed and counted: reading prompts, and writing one token after another on the cache.

A plain greedy loop: `generate` adds the same Python work to every model and token, which would hide part of what
pruning changes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel


@dataclass
class Reply:
    """A reply as far as it is written."""

    next_ids: Int[Tensor, "batch 1"]
    cache: Any
    encoder_hidden: Tensor | None
    """What the decoder reads of the prompt, unless that is in the cache only."""


def prefill(model: PreTrainedModel, prompt: Int[Tensor, "batch tokens"]) -> Reply:
    """Read prompts up to the first token of the reply.

    A decoder-only model runs over the prompt, with the head at its last position. An encoder-decoder runs its encoder
    over the prompt and its decoder over one position, the start token.
    """
    if not model.config.is_encoder_decoder:
        output = model(prompt, use_cache=True, logits_to_keep=1)
        return Reply(_greedy(output), output.past_key_values, None)
    start = getattr(model.config, "decoder_start_token_id", None) or 0
    first = torch.full((len(prompt), 1), start, dtype=prompt.dtype, device=prompt.device)
    output = model(input_ids=prompt, decoder_input_ids=first, use_cache=True)
    return Reply(_greedy(output), output.past_key_values, output.encoder_last_hidden_state)


def decode(model: PreTrainedModel, reply: Reply) -> Reply:
    """Write the next token of each reply."""
    if reply.encoder_hidden is None:
        output = model(reply.next_ids, past_key_values=reply.cache, use_cache=True)
    else:
        output = model(
            encoder_outputs=(reply.encoder_hidden,),
            decoder_input_ids=reply.next_ids,
            past_key_values=reply.cache,
            use_cache=True,
        )
    return Reply(_greedy(output), output.past_key_values, reply.encoder_hidden)


def _greedy(output: Any) -> Tensor:
    return output.logits[:, -1:].argmax(-1)
