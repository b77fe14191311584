"""Gemma 3 (text): sliding and full layers with rotary frequencies of their own, scaled embeddings, head_dim of its own.

The norms over each head have `head_dim` elements, shared by all heads: they stay whole.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from nirvana.architectures.decoder import DecoderArchitecture
from nirvana.architectures.followed import check_causal


class Gemma3Text(DecoderArchitecture):
    """The common layout."""

    model_type = "gemma3_text"
    attention = "by_layer"
    qkv_bias = "attention_bias"
    norm_offset = 1.0
    residual_scale = None  # each branch has a norm after its output projection

    def __init__(self, config: PretrainedConfig):
        check_causal(config, "use_bidirectional_attention", False)
        super().__init__(config)
        self.embedding_scale = config.hidden_size**0.5
        self.logit_softcap = config.final_logit_softcapping

    def _position_embeddings(self, rotary: nn.Module, hidden: Tensor, positions: Tensor, kind: str) -> Any:
        return rotary(hidden, positions, kind)


FAMILY = Gemma3Text
