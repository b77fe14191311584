"""Mistral: Llama's layout without biases; one sliding window for all layers, or none."""

from nirvana.architectures.decoder import DecoderFamily

FAMILY = DecoderFamily(
    model_type="mistral",
    qkv_bias=False,
    mlp_bias=False,
    attention_kinds=lambda config: (
        ["full_attention" if config.sliding_window is None else "sliding_attention"] * config.num_hidden_layers
    ),
)
