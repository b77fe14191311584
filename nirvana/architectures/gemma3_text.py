"""Gemma 3 (text): sliding and full layers with rotary frequencies of their own, scaled embeddings, head_dim of its own.

The norms over each head have `head_dim` elements, shared by all heads: they stay whole.
"""

from collections.abc import Mapping
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

    def earlier_spellings(self) -> dict[str, Any]:
        """Return the period of `layer_types` too, where they have one: earlier readers know no list."""
        kinds = self.config.layer_types
        period = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
        periodic = all((kind == "full_attention") == ((i + 1) % period == 0) for i, kind in enumerate(kinds))
        return super().earlier_spellings() | ({"sliding_window_pattern": period} if periodic else {})

    def _earlier_rope(self, rope: Mapping[str, Any]) -> dict[str, Any]:
        # one base for sliding attention is all that they know of it
        sliding = {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"]}
        return super()._earlier_rope(rope["full_attention"]) | sliding

    def _position_embeddings(self, rotary: nn.Module, hidden: Tensor, positions: Tensor, kind: str) -> Any:
        return rotary(hidden, positions, kind)


FAMILY = Gemma3Text
