"""Granite 3: four factors. Those on attention scores and residual branches are in the layers' own code."""

from transformers import PretrainedConfig

from nirvana.architectures.decoder import DecoderArchitecture


class Granite(DecoderArchitecture):
    """The common layout; the walk scales the embeddings and, in place of the logits, what the head reads."""

    model_type = "granite"
    qkv_bias = "attention_bias"
    mlp_bias = "mlp_bias"

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        self.embedding_scale = config.embedding_multiplier
        self.output_scale = 1 / config.logits_scaling
        self.residual_scale = config.residual_multiplier


FAMILY = Granite
