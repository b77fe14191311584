"""Qwen3: explicit head dimension; q and k are normalised per head, with weights that all heads share.

The shared norms have `head_dim` elements and belong to no unit: they stay whole.
"""

from nirvana.architectures.decoder import DecoderFamily

FAMILY = DecoderFamily(
    model_type="qwen3",
    qkv_bias="attention_bias",
    mlp_bias=False,
    attention_kinds=lambda config: list(config.layer_types),
)
