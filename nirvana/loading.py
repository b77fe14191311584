"""Load a dense or pruned checkpoint directory for inference."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


def load_model(directory: Path | str, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load a causal language model in float32 and evaluation mode.

    Only classes that transformers or NIRVANA itself brings are used, never code from the directory; importing
    anything of `nirvana` has registered the pruned ones.

    Args:
        directory: Hugging Face checkpoint directory.
        device: Where it computes.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    torch.nn.Module.to(model, device)  # transformers' own `to` only adds checks for quantised models
    return model
