"""Llama 2 and 3, and every model that uses their configuration (SmolLM2, TinyLlama)."""

from nirvana.architectures.decoder import DecoderFamily

FAMILY = DecoderFamily(
    model_type="llama",
    qkv_bias="attention_bias",
    mlp_bias="mlp_bias",
    attention_kinds=lambda config: ["full_attention"] * config.num_hidden_layers,
)
