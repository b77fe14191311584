"""The configuration of a pruned checkpoint: stock where all layers agree, per layer where they do not."""

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING

from nirvana.architectures.decoder import DecoderArchitecture
from nirvana.checkpoint.modeling_nirvana import PRUNED_CLASSES

MODELING_FILE = "modeling_nirvana.py"
_NOT_CARRIED = ("_name_or_path", "auto_map", "per_layer_config", "allow_global_per_layer_attribute_access")


def pruned_config(architecture: DecoderArchitecture, kept_units: Mapping[str, int]) -> dict[str, Any]:
    """Return the contents of config.json for a model that keeps the given number of units at each site.

    Layers that agree, in a size that the family's stock configuration accepts, give a stock configuration. Otherwise
    the sizes go into `per_layer_config` and `auto_map` names the classes of the modelling file.
    """
    layers = range(architecture.num_layers)
    overrides = {layer: architecture.layer_overrides(layer, kept_units) for layer in layers}
    first = overrides[0]
    if all(override == first for override in overrides.values()) and accepts_stock(architecture, first):
        return _stock_values(architecture, first)
    config_class, model_class = PRUNED_CLASSES[architecture.family.model_type]
    module = MODELING_FILE.removesuffix(".py")
    digits = len(str(architecture.num_layers - 1))
    return _base_values(architecture) | {
        "model_type": f"nirvana_{architecture.family.model_type}",
        "architectures": [model_class.__name__],
        "auto_map": {
            "AutoConfig": f"{module}.{config_class.__name__}",
            "AutoModelForCausalLM": f"{module}.{model_class.__name__}",
        },
        # Tools that read the global values get the dense ones: an upper bound for every layer.
        "allow_global_per_layer_attribute_access": True,
        "per_layer_config": {str(layer).zfill(digits): overrides[layer] for layer in layers},
    }


def accepts_stock(architecture: DecoderArchitecture, override: Mapping[str, int]) -> bool:
    """Tell whether the family's stock configuration accepts these sizes for all layers."""
    values = _stock_values(architecture, override)
    try:
        CONFIG_MAPPING[architecture.family.model_type](**values)
    except ValueError:  # transformers' own validation; huggingface_hub's strict errors derive from it
        return False
    return True


def loadable_kv_groups(architecture: DecoderArchitecture, kept: int) -> bool:
    """Tell whether a stock configuration accepts that many KV groups in every layer."""
    sites = architecture.sites()
    units = {site.name: kept if site.module == "attention" else site.units for site in sites}
    return accepts_stock(architecture, architecture.layer_overrides(0, units))


def _base_values(architecture: DecoderArchitecture) -> dict[str, Any]:
    values = {key: value for key, value in architecture.config.to_dict().items() if key not in _NOT_CARRIED}
    return values | architecture.explicit_values()


def _stock_values(architecture: DecoderArchitecture, override: Mapping[str, int]) -> dict[str, Any]:
    model_type = architecture.family.model_type
    _, model_class = PRUNED_CLASSES[model_type]
    stock_class = next(base for base in model_class.__mro__ if not base.__module__.startswith(("nirvana", "__")))
    stock_class_name = stock_class.__name__
    return _base_values(architecture) | dict(override) | {"model_type": model_type, "architectures": [stock_class_name]}
