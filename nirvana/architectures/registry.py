"""From a model's configuration to the description of its family."""

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from nirvana.architectures import llama, mistral, qwen2, qwen3
from nirvana.architectures.decoder import DecoderArchitecture
from nirvana.checkpoint.modeling_nirvana import register
from nirvana.errors import InputError

FAMILIES = {module.FAMILY.model_type: module.FAMILY for module in (llama, mistral, qwen2, qwen3)}


def architecture_for(config: PretrainedConfig) -> DecoderArchitecture:
    """Return the description of a model, dense or already pruned.

    Raises:
        InputError: If the family is not described here; the message names those that are.
    """
    model_type = config.model_type.removeprefix("nirvana_")
    if model_type not in FAMILIES:
        raise InputError(
            f"unsupported architecture {config.model_type!r}: expected one of {', '.join(sorted(FAMILIES))}; "
            "choose such a model or describe the family in nirvana/architectures/"
        )
    return DecoderArchitecture(FAMILIES[model_type], config)


def read_config(model_directory: Path | str) -> PretrainedConfig:
    """Read a model's configuration from a local directory; code in the directory is never run.

    Raises:
        InputError: If there is no readable configuration.
    """
    directory = Path(model_directory)
    register()
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory}: expected a model directory with config.json, found none; check the path")
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers makes of odd values: no common class
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(
            f"{directory}/config.json: expected the configuration of one of {', '.join(sorted(FAMILIES))}, "
            f"got one that cannot be read ({cause}); fetch the model again or choose another"
        ) from error
