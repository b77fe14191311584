"""From a model's configuration to the description of its family."""

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.utils import logging

from nirvana.architectures import family_names
from nirvana.architectures.architecture import Architecture
from nirvana.architectures.wrappers import COMPARED, text_family
from nirvana.checkpoint import modeling_nirvana
from nirvana.config_values import check_padding, config_values, culprit
from nirvana.directory_kind import Kind, kind_of_directory
from nirvana.errors import InputError
from nirvana.fields import shortened

FAMILIES: dict[str, type[Architecture]] = {
    name: importlib.import_module(f"nirvana.architectures.{name}").FAMILY for name in family_names()
}
# What cannot be described, so that its reason is said rather than "unknown".
REFUSED = dict.fromkeys(
    ("olmo2", "olmo3", "olmoe", "flex_olmo"),
    "its query and key norms run over all heads at once, so removing one head changes the others",
)


def architecture_for(config: PretrainedConfig) -> Architecture:
    """Return the description of a model, dense or already pruned.

    Raises:
        InputError: If the family is not described here, or its units are not independent; the message names those
            that are described.
    """
    model_type = config.model_type.removeprefix("nirvana_")
    if model_type in REFUSED:
        raise InputError(
            f"unsupported architecture {config.model_type!r}: {REFUSED[model_type]}; "
            f"expected one of {', '.join(FAMILIES)}"
        )
    if model_type not in FAMILIES:
        if text_family(config) in FAMILIES:
            raise _wrapped(config)
        raise InputError(
            f"unsupported architecture {config.model_type!r}: expected one of {', '.join(FAMILIES)}; "
            "choose such a model or describe the family in nirvana/architectures/ (docs/adding-a-family.md)"
        )
    return FAMILIES[model_type](config)


def _wrapped(config: PretrainedConfig) -> InputError:
    """Say how the text part of a wrapper can be had."""
    family = text_family(config)
    if config.model_type in COMPARED:
        remedy = (
            "its text part can be pruned: give the directory to model.source, which takes the text part out, or save "
            'it alone with `nirvana.text_part.write_text_part("DIR", "OTHER_DIR")` and give OTHER_DIR'
        )
    else:
        remedy = (
            f"save its language model alone, as a directory of {family}, if it is a plain one "
            '(`AutoModelForImageTextToText.from_pretrained("DIR").model.language_model` holds the weights)'
        )
    return InputError(
        f"unsupported architecture {config.model_type!r}: expected one of {', '.join(FAMILIES)}, got a wrapper around "
        f"a {family} model; {remedy}"
    )


def check_supported(config: PretrainedConfig, where: str) -> None:
    """Refuse a model whose weights are not plain numbers.

    Raises:
        InputError: If the configuration says that it is quantised.
    """
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        told = quantised if isinstance(quantised, dict) else getattr(quantised, "__dict__", {})
        method = told.get("quant_method")
        name = getattr(method, "value", method)
        raise InputError(
            f"{where}: expected weights in float64, float32, float16 or bfloat16, got a quantised model (quant_method "
            f"{shortened(name)}); prune the model it was made from, then quantise the result"
        )


def describe(
    model_directory: Path | str, check: Callable[[Architecture], None] = lambda architecture: None
) -> Architecture:
    """Return the description of the model in a directory, its sites and shapes worked out; no weights are read.

    Args:
        model_directory: Holds config.json.
        check: Called before modules are built from the configuration.

    Raises:
        InputError: If the configuration is missing, unreadable, of an unknown family, of a quantised model, or has
            values that no model can be built from.
    """
    config = read_config(model_directory)
    check_supported(config, str(model_directory))
    try:
        architecture = architecture_for(config)
        if architecture.num_layers < 1:
            raise InputError(
                f"config.json: expected at least one layer, got {architecture.num_layers}; fetch the model again"
            )
        check(architecture)
        _ = architecture.parameter_shapes
        if not any(site.weights for site in architecture.sites()):
            raise InputError("config.json: expected layers with weights, got sizes of 0; fetch the model again")
    except InputError:
        raise
    except Exception as error:  # whatever transformers makes of odd values: no common class
        raise _odd_value(model_directory, error, _builds) from error
    return architecture


def _builds(values: dict[str, Any]) -> None:
    """Build a skeleton of one layer or two from a configuration, or raise what transformers raises."""
    config = _config_of(values)
    for key in ("num_hidden_layers", "num_layers", "num_decoder_layers"):
        if isinstance(values.get(key), int):
            values = values | {key: min(values[key], 2)}
    if isinstance(kinds := getattr(config, "layer_types", None), list):
        values = values | {"layer_types": kinds[:2]}
    _ = architecture_for(_config_of(values)).parameter_shapes


def _odd_value(model_directory: Path | str, error: Exception, builds: Callable[[dict[str, Any]], object]) -> InputError:
    """Say which value of a configuration nothing can be built from."""
    values = config_values(model_directory)
    key = culprit(values, builds)
    found = f"{key}: {shortened(values[key])}" if key else "values it cannot be built from"
    remedy = f"correct {key} there" if key else "compare it with the file that the model's author published"
    cause = " ".join(str(error).split())[:160]
    return InputError(
        f"{model_directory}/config.json: expected the configuration of a model, got {found} "
        f"({type(error).__name__}: {cause}); {remedy}"
    )


def read_config(model_directory: Path | str) -> PretrainedConfig:
    """Read a model's configuration from a local directory; code in the directory is never run.

    Raises:
        InputError: If there is no readable configuration.
    """
    directory = Path(model_directory)
    if not (directory / "config.json").is_file():
        kind = kind_of_directory(directory) or Kind("none", "check the path")
        raise InputError(f"{directory}: expected a model directory with config.json, found {kind.found}; {kind.remedy}")
    values = config_values(directory)
    check_padding(values, f"{directory}/config.json")
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or not _is_known(model_type):
        raise InputError(
            f"{directory}/config.json: expected the configuration of one of {', '.join(FAMILIES)}, got model_type "
            f"{shortened(model_type)}, which the installed transformers does not know; choose another model"
        )
    try:
        return _config_of(values)
    except Exception as error:  # whatever transformers makes of odd values: no common class
        raise _odd_value(directory, error, _config_of) from error


def _is_known(model_type: str) -> bool:
    if model_type.startswith("nirvana_") and model_type.removeprefix("nirvana_") in FAMILIES:
        modeling_nirvana.register(model_type.removeprefix("nirvana_"))
    return model_type in CONFIG_MAPPING


def _config_of(values: dict[str, Any]) -> PretrainedConfig:
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # it prints the whole configuration where a value is odd; we say which
    try:
        return CONFIG_MAPPING[values["model_type"]].from_dict(copy.deepcopy(values))
    finally:
        logging.set_verbosity(before)
