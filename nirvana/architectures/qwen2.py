"""Qwen2 and Qwen2.5: biases on q, k and v; a kind of attention for each layer."""

from nirvana.architectures.decoder import DecoderFamily

FAMILY = DecoderFamily(
    model_type="qwen2",
    qkv_bias=True,
    mlp_bias=False,
    attention_kinds=lambda config: list(config.layer_types),
)
