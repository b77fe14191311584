"""The configuration of a pruned checkpoint: stock where that can express it, the pruned class's where it cannot."""

from typing import Any

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from nirvana.architectures.architecture import Architecture, Keep
from nirvana.checkpoint.modeling_nirvana import pruned_classes

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
        return values | stock | {"model_type": architecture.model_type, "architectures": [stock_class.__name__]}
    module = MODELING_FILE.removesuffix(".py")
    auto_model = "AutoModelForSeq2SeqLM" if architecture.is_encoder_decoder else "AutoModelForCausalLM"
    return (
        values
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
