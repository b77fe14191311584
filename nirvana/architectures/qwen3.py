"""Qwen3: explicit head dimension; q and k are normalised per head, with weights that all heads share.

The shared norms have `head_dim` elements and belong to no unit: they stay whole.
"""

from nirvana.architectures.decoder import DecoderArchitecture


class Qwen3(DecoderArchitecture):
    """The common layout."""

    model_type = "qwen3"
    attention = "by_layer"
    qkv_bias = "attention_bias"


FAMILY = Qwen3
