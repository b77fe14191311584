"""Pruned causal language models whose layers differ in size.

This file travels with every such checkpoint (`auto_map`), so that it loads with `trust_remote_code=True` where NIRVANA
is not installed; `import nirvana` registers the same classes and makes the flag unnecessary. It needs transformers
>= 5.15, whose configurations carry `per_layer_config`.
"""

import logging

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

# The dense layers are built from the global values before they are replaced below: no reason to warn of ambiguity.
logging.getLogger("transformers.integrations.heterogeneity.configuration_utils").setLevel(logging.ERROR)


class _PrunedConfig:
    def validate_architecture(self):
        """Accept any number of heads: pruned layers need not divide the hidden size, `head_dim` is explicit."""


class _PrunedModel:
    def __init__(self, config):
        super().__init__(config)
        for index, dense in enumerate(self.model.layers):
            layer = type(dense)(config.per_layer_config[index], index)
            for module in layer.modules():
                if getattr(module, "config", None) is not None:
                    module.config = config  # one shared object, so that set_attn_implementation reaches every layer
            self.model.layers[index] = layer
        self.post_init()


class NirvanaLlamaConfig(_PrunedConfig, LlamaConfig):
    model_type = "nirvana_llama"


class NirvanaMistralConfig(_PrunedConfig, MistralConfig):
    model_type = "nirvana_mistral"


class NirvanaQwen2Config(_PrunedConfig, Qwen2Config):
    model_type = "nirvana_qwen2"


class NirvanaQwen3Config(_PrunedConfig, Qwen3Config):
    model_type = "nirvana_qwen3"


class NirvanaLlamaForCausalLM(_PrunedModel, LlamaForCausalLM):
    config_class = NirvanaLlamaConfig


class NirvanaMistralForCausalLM(_PrunedModel, MistralForCausalLM):
    config_class = NirvanaMistralConfig


class NirvanaQwen2ForCausalLM(_PrunedModel, Qwen2ForCausalLM):
    config_class = NirvanaQwen2Config


class NirvanaQwen3ForCausalLM(_PrunedModel, Qwen3ForCausalLM):
    config_class = NirvanaQwen3Config


PRUNED_CLASSES = {
    "llama": (NirvanaLlamaConfig, NirvanaLlamaForCausalLM),
    "mistral": (NirvanaMistralConfig, NirvanaMistralForCausalLM),
    "qwen2": (NirvanaQwen2Config, NirvanaQwen2ForCausalLM),
    "qwen3": (NirvanaQwen3Config, NirvanaQwen3ForCausalLM),
}


def register():
    """Make the Auto classes of transformers know the pruned models."""
    for config_class, model_class in PRUNED_CLASSES.values():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
