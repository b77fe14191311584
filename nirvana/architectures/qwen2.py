"""Qwen2 and Qwen2.5: biases on q, k and v; a kind of attention for each layer."""

from nirvana.architectures.decoder import DecoderArchitecture


class Qwen2(DecoderArchitecture):
    """The common layout with biases in attention."""

    model_type = "qwen2"
    attention = "by_layer"
    qkv_bias = True


FAMILY = Qwen2
