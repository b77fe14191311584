"""A quantised GGUF file becomes a plain Hugging Face directory: fp32 safetensors, config, tokenizer.

transformers reads GGUF but the model it returns still counts as quantised and refuses `save_pretrained`; the same
weights under the same config without its `quantization_config` are an ordinary model.
"""

import logging
from pathlib import Path
from typing import Any

from nirvana.errors import InputError

_LOG = logging.getLogger(__name__)


def convert_gguf(gguf_file: Path, directory: Path) -> None:
    """Dequantise a GGUF model to fp32 and save it, with its tokenizer, as a Hugging Face directory.

    Args:
        gguf_file: The GGUF file; it carries weights, configuration and vocabulary.
        directory: Where config.json, the safetensors and the tokenizer files go; exists already.

    Raises:
        InputError: If the file is not GGUF, or holds an architecture that transformers cannot read from GGUF or
            that cannot be pruned.
    """
    with gguf_file.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise InputError(
            f"{gguf_file.name}: expected a GGUF file, which begins with the bytes GGUF, got {magic!r}; "
            "name another member or download the file again"
        )

    from transformers import AutoConfig, AutoTokenizer

    from nirvana.architectures.registry import FAMILIES, architecture_for

    _LOG.info("converting %s to fp32 safetensors (20-130 s)", gguf_file.name)
    location = {"gguf_file": gguf_file.name, "local_files_only": True}
    try:
        architecture_for(AutoConfig.from_pretrained(gguf_file.parent, **location))
        tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, **location)
        model = _load_dequantised(gguf_file, location)
    except InputError:
        raise
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{gguf_file.name}: transformers cannot read this GGUF file ({reason}); use a whole file of one of "
            f"{', '.join(sorted(FAMILIES))}, or a safetensors checkpoint of the same model (hf: or path:)"
        ) from error
    model.save_pretrained(directory)
    for option in ("local_files_only", "is_local", "gguf_file"):  # how it was read here is no property of the tokenizer
        tokenizer.init_kwargs.pop(option, None)
    tokenizer.save_pretrained(directory)
    _LOG.info("converted %s", gguf_file.name)


def _load_dequantised(gguf_file: Path, location: dict[str, Any]) -> Any:
    """Return the model of a GGUF file as an ordinary fp32 model."""
    import torch
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(gguf_file.parent, dtype=torch.float32, **location)
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    config = type(read.config).from_dict(settings)
    weights = read.state_dict()
    model: Any = type(read)(config).float()
    model.load_state_dict(weights, strict=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    return model.eval()
