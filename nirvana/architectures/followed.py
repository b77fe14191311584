"""Switches of a configuration that change what a model computes and that no description follows: refused by name.

A family's own switches are read by its description or by the stock class's layers, which the walk runs. What is here is
what transformers reads for every family, outside the layers.
"""

import json

from transformers import PretrainedConfig

from nirvana.errors import InputError

_WHY_CAUSAL = (
    "every token would see the ones after it, and saliency, perplexity and generation are about the next token; "
    "choose a causal language model"
)


def check_causal(config: PretrainedConfig, key: str, causal: bool) -> None:
    """Refuse a model that sees the token it is asked for.

    Raises:
        InputError: If `config` has the key with another value than `causal`.
    """
    value = getattr(config, key, causal)
    if value is not causal:
        raise InputError(
            f"config.json: expected {key}: {str(causal).lower()} or no such key, got {json_of(value)}: {_WHY_CAUSAL}"
        )


def check_generic(config: PretrainedConfig, model_type: str, is_encoder_decoder: bool) -> None:
    """Refuse the switches that every class of transformers reads and the walk does not follow.

    Args:
        config: Of the model.
        model_type: The family's stock type.
        is_encoder_decoder: Whether the family is.

    Raises:
        InputError: If there is one; the message names it.
    """
    check_causal(config, "is_causal", True)
    if bool(config.is_encoder_decoder) != is_encoder_decoder:
        raise InputError(
            f"config.json: expected is_encoder_decoder: {str(is_encoder_decoder).lower()} for {model_type}, "
            f"got {json_of(config.is_encoder_decoder)}; set it so, or leave the key out"
        )
    if not config.return_dict:
        raise InputError(
            "config.json: expected return_dict: true or no such key, got false, which changes what the model returns; "
            "set it to true"
        )
    if config.model_type != model_type:  # pruned: its sizes a layer are its own
        return
    if config.is_heterogeneous and config.to_dict().get("per_layer_config"):
        raise InputError(
            f"config.json: expected no per_layer_config in a {model_type} model, whose class builds all layers alike; "
            "a checkpoint that NIRVANA pruned has the model_type that begins with nirvana_"
        )
    if getattr(config, "pruned_layers", None) is not None:
        raise InputError(
            f"config.json: expected no pruned_layers in a {model_type} model, whose class does not read it; "
            "a checkpoint that NIRVANA pruned has the model_type that begins with nirvana_"
        )


def json_of(value: object) -> str:
    """Return a short value as JSON spells it."""
    return json.dumps(value, default=repr)[:60]
