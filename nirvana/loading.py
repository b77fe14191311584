"""Load a dense or pruned checkpoint directory for inference."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from nirvana.architectures.registry import FAMILIES, describe, read_config
from nirvana.directory_kind import refuse_adapter
from nirvana.errors import InputError


def load_config(directory: Path | str) -> PreTrainedConfig:
    """Read the configuration of a checkpoint.

    Args:
        directory: Hugging Face checkpoint directory.

    Raises:
        InputError: If there is no such checkpoint, or its configuration cannot be read.
    """
    return read_config(directory)


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the class that makes a language model of a configuration: one stack, or encoder and decoder."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def load_model(directory: Path | str, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load a language model, decoder-only or encoder-decoder, in float32 and evaluation mode.

    Only classes that transformers or NIRVANA itself brings are used, never code from the directory; importing
    anything of `nirvana` has registered the pruned ones.

    Args:
        directory: Hugging Face checkpoint directory.
        device: Where it computes.

    Raises:
        InputError: If there is no such checkpoint, or it cannot be read.
    """
    config = load_config(directory)
    refuse_adapter((file.name for file in Path(directory).iterdir()), directory)
    try:
        model, told = auto_class(config).from_pretrained(
            directory,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except MemoryError:
        raise
    except Exception as error:  # whatever transformers makes of odd values: no common class
        if config.model_type.removeprefix("nirvana_") in FAMILIES:
            describe(directory)  # says which value it is, if it is one of config.json
        raise _broken(directory, error) from error
    missing = sorted(told["missing_keys"])
    if missing:  # transformers would put random numbers in their place
        raise InputError(
            f"{directory}: expected all weights of a {config.model_type} model, found no {missing[0]} "
            f"({len(missing)} missing); configuration and weights do not belong together, or the names of the weights "
            'are not those that transformers reads: `nirvana.text_part.write_text_part("DIR", "OTHER_DIR")` writes '
            "them anew where NIRVANA knows them"
        )
    model = model.eval()
    torch.nn.Module.to(model, device)  # transformers' own `to` only adds checks for quantised models
    return model


def _broken(directory: Path | str, error: Exception) -> InputError:
    cause = " ".join(str(error).split())[:200]
    return InputError(f"{directory}: expected a whole checkpoint, got one that cannot be loaded ({cause})")
