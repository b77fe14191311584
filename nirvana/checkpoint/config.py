"""The configuration of a pruned checkpoint: stock where that can express it, the pruned class's where it cannot."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from nirvana.architectures.architecture import Architecture, Keep
from nirvana.checkpoint.modeling_nirvana import pruned_classes
from nirvana.walk import Stack

MODELING_FILE = "modeling_nirvana.py"
_NOT_CARRIED = (
    "_name_or_path",
    "auto_map",
    "per_layer_config",
    "pruned_layers",
    "allow_global_per_layer_attribute_access",
)


def pruned_config(architecture: Architecture, keep: Keep) -> dict[str, Any]:
    """Return the contents of config.json for a model that keeps the given units.

    Layers that agree, in a size that the family's stock configuration accepts, give a stock configuration. Otherwise
    the sizes go into the pruned class's own keys and `auto_map` names the classes of the modelling file.
    """
    values = {key: value for key, value in architecture.config.to_dict().items() if key not in _NOT_CARRIED}
    stock = stock_overrides(architecture, keep)
    config_class, model_class = pruned_classes(architecture.model_type)
    if stock is not None:
        stock_class = next(base for base in model_class.__mro__ if base.__module__.startswith("transformers."))
        values |= stock | {"model_type": architecture.model_type, "architectures": [stock_class.__name__]}
        return values | both_spellings(architecture, values)
    module = MODELING_FILE.removesuffix(".py")
    auto_model = "AutoModelForSeq2SeqLM" if architecture.is_encoder_decoder else "AutoModelForCausalLM"
    return (
        values
        | both_spellings(architecture, values)
        | architecture.pruned_overrides({name: len(indices) for name, indices in keep.items()})
        | {
            "model_type": f"nirvana_{architecture.model_type}",
            "architectures": [model_class.__name__],
            "auto_map": {
                "AutoConfig": f"{module}.{config_class.__name__}",
                auto_model: f"{module}.{model_class.__name__}",
            },
        }
    )


def both_spellings(architecture: Architecture, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a configuration that readers look for under other keys than this transformers writes.

    transformers 5 writes `rope_parameters`; its own earlier releases and tools with code of their own read a top-level
    `rope_theta` and `rope_scaling`, and take a default of theirs, without a word, where there is none. A field that the
    configuration class declares is written under its declared name too (Qwen3-MoE: `num_experts`).

    Args:
        architecture: Of the model.
        values: Contents of its config.json.

    Returns:
        Both spellings of each such value; transformers reads them back as it reads `values`.
    """
    config_class = CONFIG_MAPPING[architecture.model_type]
    declared = {field.name for field in dataclasses.fields(config_class)}
    result = {
        alias: values[name]
        for alias, name in config_class.attribute_map.items()
        if alias in declared and name in values
    }
    if isinstance(values.get("dtype"), str):
        result["torch_dtype"] = values["dtype"]
    return result | architecture.earlier_spellings()


def own_head(stack: Stack) -> dict[str, bool]:
    """Return `tie_word_embeddings: false` where head and embedding are both stored and differ, else nothing.

    transformers looks at the tensors and does not tie these, whatever the configuration says; other readers trust it.
    """
    architecture, weights = stack.architecture, stack.weights
    own, shared = architecture.own_head_parameter, architecture.embedding_parameter
    # an encoder-decoder's key has another meaning: T5 reads it as "scale the outputs"
    if architecture.is_encoder_decoder or own not in weights or not architecture.config.tie_word_embeddings:
        return {}
    return {} if torch.equal(weights[own], weights[shared]) else {"tie_word_embeddings": False}


def stock_overrides(architecture: Architecture, keep: Keep) -> dict[str, Any] | None:
    """Return the values that make the family's stock configuration describe these units; None if none do."""
    overrides = architecture.stock_overrides(keep)
    if overrides is None:
        return None
    values = {key: value for key, value in architecture.config.to_dict().items() if key not in _NOT_CARRIED}
    try:
        CONFIG_MAPPING[architecture.model_type](**(values | overrides | {"model_type": architecture.model_type}))
    except (ValueError, StrictDataclassError):  # transformers' own validation, run by huggingface_hub
        return None
    return overrides


def loadable_kv_groups(architecture: Architecture, kept: int) -> bool:
    """Tell whether a stock configuration accepts that many KV groups in every layer."""
    units = {site.name: kept if site.module == "attention" else site.units for site in architecture.sites()}
    return stock_overrides(architecture, {name: np.arange(count) for name, count in units.items()}) is not None
