"""Low-rank adapters (LoRA) of a pruned model: where they sit, how they are stored, how they become plain weights.

An adapter leaves a weight W as it is and adds (alpha / rank) · B A to it. It sits on every weight that a unit owns,
as the family describes its sites; a weight that is not the matrix of a linear layer of its own (the fused experts of a
mixture) keeps what pruning left.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). Files are peft's.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nirvana.architectures.architecture import Architecture
from nirvana.checkpoint.companions import copy_companions, has_tokenizer
from nirvana.checkpoint.digests import DIGESTS_NAME
from nirvana.checkpoint.safetensors_stream import stream_safetensors
from nirvana.checkpoint.tokenizer import check_same_ids, read_tokenizer
from nirvana.errors import InputError
from nirvana.fields import Fields
from nirvana.files import atomic_file, copy_regular, read_json, write_json
from nirvana.weights import WeightFiles

_LOG = logging.getLogger(__name__)
ADAPTER_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
_PREFIX = "base_model.model."  # what peft puts before every module's name
_LARGEST = 1 << 16


def attach(model: Any, architecture: Architecture, rank: int, alpha: float, seed: int) -> Any:
    """Freeze a model and put an adapter on each weight that a unit owns; the model's output does not change yet.

    Args:
        model: Loaded on the CPU: initial values are then the same whatever computes later. Changed in place.
        architecture: Describes the model; its sites name the weights.
        rank: Rows of A.
        alpha: The sum B A counts alpha / rank times.
        seed: Of A, uniform as peft makes it; B is zero.

    Returns:
        peft's model around it.

    Raises:
        InputError: If peft is not installed, or no weight is a linear layer's.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError(
            f"recovery: expected the package peft for low-rank adapters, it cannot be imported ({error}); "
            "run `pip install peft`, or set recovery.tokens to 0"
        ) from error
    modules = adapted_modules(model, architecture)
    if not modules:
        raise InputError(
            f"recovery: expected linear layers among the prunable weights of a {architecture.model_type} model, found "
            "none; set recovery.tokens to 0"
        )
    owned = {slot.parameter for site in architecture.sites() for slot in site.weight_slots}
    unreached = sorted(name for name in owned if name.removesuffix(".weight") not in modules)
    if unreached:
        _LOG.warning(
            "adapters reach linear layers only: %d prunable tensors keep what pruning left, such as %s",
            len(unreached),
            unreached[0],
        )
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=modules)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def adapted_modules(model: nn.Module, architecture: Architecture) -> list[str]:
    """Return the names of the linear layers whose weights units own, in order."""
    owned = {slot.parameter for site in architecture.sites() for slot in site.weight_slots}
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return sorted(name for name in linear if f"{name}.weight" in owned)


def adapter_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Return the trainable parameters of a model with adapters, by the names that peft gives them in a file."""
    trainable = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return dict(sorted((name.replace(".default.", "."), parameter) for name, parameter in trainable))


@dataclass(frozen=True)
class Adapter:
    """The matrices of a model's adapters."""

    rank: int
    alpha: float
    matrices: dict[str, Tensor]
    """A `[rank, in]` and B `[out, rank]` of each module, float32 on the CPU, by the names that peft gives them."""

    @classmethod
    def of(cls, model: Any, rank: int, alpha: float) -> "Adapter":
        """Copy the adapters of a model."""
        return cls(rank, alpha, {name: p.detach().cpu().clone() for name, p in adapter_parameters(model).items()})

    @classmethod
    def load(cls, directory: Path | str) -> "Adapter":
        """Read what `save` wrote.

        Raises:
            InputError: If a file is missing or broken.
        """
        directory = Path(directory)
        remedy = "run `dvc repro recover` to make it anew"
        config = Fields(read_json(directory / CONFIG_NAME), f"{directory / CONFIG_NAME}", remedy)
        alpha = config.raw("lora_alpha")
        if type(alpha) not in (int, float):
            raise config.refused("a number", alpha, "lora_alpha")
        try:
            matrices = load_file(directory / ADAPTER_NAME)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{directory / ADAPTER_NAME}: expected an adapter, got a file that cannot be read ({error}); {remedy}"
            ) from error
        return cls(config.whole("r", 1, _LARGEST), float(alpha), matrices)

    def save(self, directory: Path | str) -> None:
        """Write the adapter alone; `peft.PeftModel.from_pretrained` puts it on the pruned checkpoint."""
        directory = Path(directory)
        with atomic_file(directory / ADAPTER_NAME) as temporary:
            save_file(self.matrices, temporary, {"format": "pt"})
            temporary.chmod(0o644)
        write_json(
            directory / CONFIG_NAME,
            {
                "peft_type": "LORA",
                "base_model_name_or_path": None,  # wherever the pruned checkpoint is
                "r": self.rank,
                "lora_alpha": self.alpha,
                "lora_dropout": 0.0,
                "bias": "none",
                "inference_mode": True,
                "target_modules": self.modules,
            },
        )

    @property
    def modules(self) -> list[str]:
        """Names of the modules it changes, in order."""
        suffix = ".lora_A.weight"
        return sorted(name.removeprefix(_PREFIX).removesuffix(suffix) for name in self.matrices if suffix in name)

    @property
    def parameters(self) -> int:
        """Numbers in it."""
        return sum(matrix.numel() for matrix in self.matrices.values())

    def apply(self, parameter: str, weight: Tensor) -> Tensor:
        """Return a weight with what the adapter adds to it, summed in float32, in the weight's own type."""
        module = f"{_PREFIX}{parameter.removesuffix('.weight')}"
        down, up = (self.matrices.get(f"{module}.lora_{name}.weight") for name in "AB")
        if down is None or up is None or not parameter.endswith(".weight"):
            return weight
        return (weight.float() + (up @ down) * (self.alpha / self.rank)).to(weight.dtype)


def merge(checkpoint: Path | str, adapter: Adapter, directory: Path | str) -> None:
    """Write a checkpoint with its adapter added to the weights: same files, same names, same types and shapes.

    Args:
        checkpoint: The checkpoint that the adapter was trained on.
        adapter: What is added.
        directory: An empty directory, which the caller makes appear whole.

    Raises:
        InputError: If the adapter is of another checkpoint.
    """
    checkpoint, directory = Path(checkpoint), Path(directory)
    weights = WeightFiles(checkpoint)
    for module in adapter.modules:
        down, up = (adapter.matrices[f"{_PREFIX}{module}.lora_{name}.weight"] for name in "AB")
        expected = weights.shape(f"{module}.weight")
        if (up.shape[0], down.shape[1]) != expected:
            raise InputError(
                f"adapter: expected matrices for {module}.weight of shape {expected}, got some for "
                f"{(up.shape[0], down.shape[1])}; it was trained on another checkpoint: recover this one anew"
            )
    for file in sorted(set(weights.file_of.values())):
        header = {name: (weights.dtype(name), weights.shape(name)) for name in weights if weights.file_of[name] == file}
        stream_safetensors(directory / file.name, header, lambda name: adapter.apply(name, weights[name]))
    for file in sorted(checkpoint.iterdir()):  # but no adapter that lies there: it would be added once more on loading
        if file.is_file() and file.suffix != ".safetensors" and file.name not in (CONFIG_NAME, DIGESTS_NAME):
            copy_regular(file, directory / file.name, checkpoint)
    copy_companions(checkpoint, directory)  # templates in a folder of their own too
    if has_tokenizer(checkpoint):
        check_same_ids(read_tokenizer(checkpoint), directory)
