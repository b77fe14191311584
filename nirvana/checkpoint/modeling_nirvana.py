"""Pruned language models whose layers differ in size.

This file travels with every such checkpoint (`auto_map`), so that it loads with `trust_remote_code=True` where NIRVANA
is not installed; `import nirvana` registers the same classes and makes the flag unnecessary. It needs transformers
>= 5.15, whose configurations carry `per_layer_config`.

No family is listed here: `Nirvana<Class>` is made from transformers' own `<Class>` when it is asked for.
"""

import copy
import logging

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.t5.modeling_t5 import T5Attention, T5Block, T5LayerCrossAttention

# The dense layers are built from the global values before they are replaced below: no reason to warn of ambiguity.
logging.getLogger("transformers.integrations.heterogeneity.configuration_utils").setLevel(logging.ERROR)


class _PrunedConfig:
    def validate_architecture(self):
        """Accept any number of heads: pruned layers need not divide the hidden size, `head_dim` is explicit."""


class _LayerConfig:
    """The model's one configuration as a layer sees it: with sizes of its own.

    Everything else is read from the shared object, so that set_attn_implementation reaches every layer.
    """

    def __init__(self, shared, own):
        self.__dict__.update(_shared=shared, _own=own)

    def __getattr__(self, name):
        if name.startswith("__") or "_own" not in self.__dict__:  # while it is being copied
            raise AttributeError(name)
        return self._own[name] if name in self._own else getattr(self._shared, name)


def _share_config(layer, config, own):
    for module in layer.modules():
        if getattr(module, "config", None) is not None:
            module.config = _LayerConfig(config, own)


class _PrunedDecoder:
    def __init__(self, config):
        super().__init__(config)
        overrides = config.to_dict()["per_layer_config"]
        for index, dense in enumerate(self.model.layers):
            layer = type(dense)(config.per_layer_config[index], index)
            own = next((sizes for key, sizes in overrides.items() if int(key) == index), {})
            if own.get("moe_intermediate_size", 0) % 8:  # the grouped product takes rows of whole 16 bytes only
                own = own | {"_experts_implementation": "eager"}
            _share_config(layer, config, own)
            self.model.layers[index] = layer
        self.post_init()


class _OwnBiasAttention(T5Attention):
    """Attention that never takes the position bias of an earlier layer: the two keep different heads."""

    def forward(self, hidden_states, mask=None, key_value_states=None, position_bias=None, **kwargs):
        return super().forward(hidden_states, mask, key_value_states, None, **kwargs)


def _sized(config, **sizes):
    config = copy.copy(config)
    for key, value in sizes.items():
        setattr(config, key, value)
    return config


def pruned_t5_block(config, index, heads, cross_heads, neurons):
    """Return one T5 block with that many heads and neurons, and a relative position bias of its own."""
    block = T5Block(_sized(config, num_heads=heads, d_ff=neurons), has_relative_attention_bias=True, layer_idx=index)
    if config.is_decoder:
        block.layer[1] = T5LayerCrossAttention(_sized(config, num_heads=cross_heads), layer_idx=index)
    for module in block.modules():
        if isinstance(module, T5Attention):
            module.__class__ = _OwnBiasAttention
    return block


class _PrunedT5:
    def __init__(self, config):
        super().__init__(config)
        for name in ("encoder", "decoder"):
            stack = getattr(self, name)
            for index, sizes in enumerate(config.pruned_layers[name]):
                block = pruned_t5_block(
                    stack.config, index, sizes["num_heads"], sizes.get("cross_num_heads"), sizes["d_ff"]
                )
                _share_config(block, stack.config, {})
                stack.block[index] = block
        self.post_init()


def pruned_classes(model_type):
    """Return the configuration and the model class of a family's pruned models."""
    stock_config = CONFIG_MAPPING[model_type]
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if stock_config.is_encoder_decoder:
        mapping = transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    return _named(f"Nirvana{stock_config.__name__}"), _named(f"Nirvana{mapping[stock_config].__name__}")


def _named(name):
    return globals().get(name) or __getattr__(name)


def __getattr__(name):
    stock = getattr(transformers, name.removeprefix("Nirvana"), None) if name.startswith("Nirvana") else None
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if issubclass(stock, transformers.PretrainedConfig):
        bases, own = (_PrunedConfig, stock), {"model_type": f"nirvana_{stock.model_type}", "_auto_class": "AutoConfig"}
        conversion = get_checkpoint_conversion_mapping(stock.model_type)
        if conversion:  # files that hold expert by expert what the module has as one tensor
            register_checkpoint_conversion_mapping(own["model_type"], conversion, overwrite=True)
    else:
        pruned = _PrunedT5 if stock.config_class.model_type == "t5" else _PrunedDecoder
        config_class = _named(f"Nirvana{stock.config_class.__name__}")
        auto = "AutoModelForSeq2SeqLM" if config_class.is_encoder_decoder else "AutoModelForCausalLM"
        # _auto_class: save_pretrained puts this file beside what it saves, also where `import nirvana` has loaded it
        bases, own = (pruned, stock), {"config_class": config_class, "_auto_class": auto}
    globals()[name] = type(name, bases, own | {"__module__": __name__})
    return globals()[name]


def register(model_type):
    """Make the Auto classes of transformers know the pruned models of one family."""
    config_class, model_class = pruned_classes(model_type)
    auto_model = AutoModelForSeq2SeqLM if config_class.is_encoder_decoder else AutoModelForCausalLM
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    auto_model.register(config_class, model_class, exist_ok=True)
