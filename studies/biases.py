"""A checkpoint with FLAP's bias: a parameter that Llama's configuration can have, and other families' cannot."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from nirvana.architectures.registry import describe
from nirvana.errors import InputError
from nirvana.files import atomic_directory, read_json, write_json
from nirvana.weights import WeightFiles


def write_with_biases(checkpoint: Path, biases: Mapping[str, Tensor], target: Path) -> None:
    """Write a checkpoint again with biases on its linear layers: those given, the others zero.

    Raises:
        InputError: If the family's configuration knows no such biases.
    """
    kind = describe(checkpoint).model_type
    if kind != "llama":
        raise InputError(
            f"bias: expected a model of Llama's configuration, which can have biases, got {kind}; choose flap without"
        )
    with atomic_directory(target) as temporary:
        for file in checkpoint.iterdir():
            if ".safetensors" not in file.name:  # the weights and their index
                shutil.copy(file, temporary)
        configuration = temporary / "config.json"
        write_json(configuration, read_json(configuration) | {"attention_bias": True, "mlp_bias": True})
        stored = WeightFiles(checkpoint)
        tensors = {name: stored[name] for name in stored}
        for name, shape in describe(temporary).parameter_shapes.items():
            if name.endswith(".bias") and name not in tensors:
                tensors[name] = biases[name].cpu() if name in biases else torch.zeros(shape)
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
