"""Load a dense or pruned checkpoint directory for inference."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from nirvana.errors import InputError


def load_model(directory: Path | str, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load a causal language model in float32 and evaluation mode.

    Only classes that transformers or NIRVANA itself brings are used, never code from the directory; importing
    anything of `nirvana` has registered the pruned ones.

    Args:
        directory: Hugging Face checkpoint directory.
        device: Where it computes.

    Raises:
        InputError: If there is no such checkpoint, or it cannot be read.
    """
    if not (Path(directory) / "config.json").is_file():
        raise InputError(f"{directory}: expected a checkpoint directory with config.json, found none; check the path")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        ).eval()
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        cause = " ".join(str(error).split())[:200]
        raise InputError(
            f"{directory}: expected a whole checkpoint, got one that cannot be loaded ({cause})"
        ) from error
    torch.nn.Module.to(model, device)  # transformers' own `to` only adds checks for quantised models
    return model
