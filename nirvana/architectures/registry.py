"""From a model's configuration to the description of its family."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from nirvana.architectures import family_names
from nirvana.architectures.architecture import Architecture
from nirvana.errors import InputError
from nirvana.fields import shortened
from nirvana.files import read_json

FAMILIES: dict[str, type[Architecture]] = {
    name: importlib.import_module(f"nirvana.architectures.{name}").FAMILY for name in family_names()
}
# What cannot be described, so that its reason is said rather than "unknown".
REFUSED = dict.fromkeys(
    ("olmo2", "olmo3", "olmoe", "flex_olmo"),
    "its query and key norms run over all heads at once, so removing one head changes the others",
)

# Far beyond any real model. Configuration classes and skeletons run loops and make lists of these lengths, so that a
# broken number would cost all memory before any other check sees it.
_MOST_LAYERS, _MOST_COUNTED = 500, 10_000
# Keys that make transformers read other files than the ones a model's digest covers.
_REDIRECTING = ("transformers_weights", "configuration_files")


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
        raise InputError(
            f"unsupported architecture {config.model_type!r}: expected one of {', '.join(FAMILIES)}; "
            "choose such a model or describe the family in nirvana/architectures/ (docs/adding-a-family.md)"
        )
    return FAMILIES[model_type](config)


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
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"{model_directory}: expected weights in float64, float32, float16 or bfloat16, got a quantised model; "
            "prune the model it was made from, then quantise the result"
        )
    try:
        architecture = architecture_for(config)
        if architecture.num_layers < 1:
            raise InputError(
                f"config.json: expected at least one layer, got {architecture.num_layers}; fetch the model again"
            )
        check(architecture)
        _ = architecture.parameter_shapes, architecture.sites()
    except InputError:
        raise
    except Exception as error:  # whatever transformers makes of odd values: no common class
        raise InputError(
            f"{model_directory}/config.json: expected the configuration of a model, got values it cannot be built "
            f"from ({type(error).__name__}: {str(error)[:120]}); fetch the model again"
        ) from error
    return architecture


def read_config(model_directory: Path | str) -> PretrainedConfig:
    """Read a model's configuration from a local directory; code in the directory is never run.

    Raises:
        InputError: If there is no readable configuration.
    """
    directory = Path(model_directory)
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory}: expected a model directory with config.json, found none; check the path")
    content = read_json(directory / "config.json")
    _check_counts(directory / "config.json", content)
    for key in _REDIRECTING:
        if isinstance(content, dict) and key in content:
            raise InputError(
                f"{directory}/config.json: expected no key {key}, which would load other files than the model's own; "
                "remove it if you trust the model"
            )
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers makes of odd values: no common class
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(
            f"{directory}/config.json: expected the configuration of one of {', '.join(FAMILIES)}, "
            f"got one that cannot be read ({cause}); fetch the model again or choose another"
        ) from error


def _check_counts(path: Path, config: Any) -> None:
    """Refuse counts (`num_layers`, `num_experts`, `num_labels`, ...) that no model has, at any depth."""
    waiting = [config]
    while waiting:
        value = waiting.pop()
        waiting += value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
        for key, count in value.items() if isinstance(value, dict) else ():
            most = _MOST_LAYERS if key.endswith("layers") else _MOST_COUNTED
            if key.startswith("num_") and isinstance(count, int | float) and count > most:
                raise InputError(
                    f"{path}: expected {key} of at most {most}, got {shortened(count)}; fetch the model again"
                )
