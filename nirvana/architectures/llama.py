"""Llama 2 and 3, and every model that uses their configuration (SmolLM2, TinyLlama)."""

from nirvana.architectures.decoder import DecoderArchitecture


class Llama(DecoderArchitecture):
    """The common layout; biases where the configuration says so."""

    model_type = "llama"
    gguf_layout = True
    qkv_bias = "attention_bias"
    mlp_bias = "mlp_bias"


FAMILY = Llama
