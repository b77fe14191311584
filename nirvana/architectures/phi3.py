"""Phi-3 and Phi-4-mini: q, k and v in one matrix, gate and up in another."""

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from nirvana.architectures.decoder import DecoderArchitecture, head_dim_of
from nirvana.architectures.site import Slot


class Phi3(DecoderArchitecture):
    """Fused projections: the rows of `qkv_proj` are all queries, then all keys, then all values."""

    model_type = "phi3"
    attention = "window"

    def _earlier_rope(self, rope: Mapping[str, Any]) -> dict[str, Any]:
        result = super()._earlier_rope(rope)
        scaling = result["rope_scaling"]
        if scaling is not None:
            # They want these three in `rope_scaling` and no others, unless there is more to say: transformers 5
            # reads this key before the later one.
            if scaling.get("original_max_position_embeddings") == self.config.original_max_position_embeddings:
                del scaling["original_max_position_embeddings"]
            result["rope_scaling"] = {"type": scaling.pop("rope_type"), **scaling}
        return result

    def _attention_slots(self, prefix: str, config: PretrainedConfig) -> tuple[Slot, ...]:
        hidden, head_dim, groups = config.hidden_size, head_dim_of(config), config.num_key_value_heads
        queries = config.num_attention_heads // groups * head_dim
        fused, keys_start = f"{prefix}qkv_proj.weight", groups * queries
        return (
            Slot(fused, 0, queries, hidden),
            Slot(fused, 0, head_dim, hidden, base=keys_start),
            Slot(fused, 0, head_dim, hidden, base=keys_start + groups * head_dim),
            Slot(f"{prefix}o_proj.weight", 1, queries, hidden),
        )

    def _mlp_slots(self, prefix: str, config: PretrainedConfig) -> tuple[Slot, ...]:
        hidden, fused = config.hidden_size, f"{prefix}gate_up_proj.weight"
        return (
            Slot(fused, 0, 1, hidden),
            Slot(fused, 0, 1, hidden, base=config.intermediate_size),
            Slot(f"{prefix}down_proj.weight", 1, 1, hidden),
        )


FAMILY = Phi3
