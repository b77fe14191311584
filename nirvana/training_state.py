"""What a killed training run goes on from: parameters, AdamW's moments, the position, the curve so far.

One safetensors file, its JSON in the header: it appears whole or not at all, a digest of all of it tells one that was
damaged since, and reading it runs no code. No random
number is drawn once training has begun (no dropout; the order of the text follows from seed and position), so no
generator's state belongs to it.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nirvana.files import atomic_file

_LOG = logging.getLogger(__name__)
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(
    file: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.AdamW, position: Mapping[str, Any]
) -> None:
    """Write the state after a whole step.

    Args:
        file: Replaced.
        parameters: What is trained, by name.
        optimizer: AdamW over them, after its first step.
        position: JSON: `step`, the steps taken, and whatever else the caller goes on from.
    """
    tensors = {f"parameter.{name}": parameter.detach().cpu() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        tensors |= {f"{moment}.{name}": optimizer.state[parameter][moment].cpu() for moment in _MOMENTS}
    said = json.dumps(position)
    with atomic_file(file) as temporary:
        save_file(tensors, temporary, {"position": said, "digest": _digest(tensors, said)})


def _digest(tensors: Mapping[str, Tensor], position: str) -> str:
    """Return the hex SHA-256 of names, types, shapes and bytes of the tensors, and of the position."""
    digest = hashlib.sha256(position.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_state(
    file: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.AdamW
) -> dict[str, Any] | None:
    """Put parameters and optimizer back to where they were.

    Returns:
        The position; None where there is no file, a damaged one, or one that is not of these parameters, and nothing
        was changed.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            position = json.loads(metadata["position"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        _LOG.warning("starting over: %s cannot be read (%s)", file, error)
        return None
    if metadata.get("digest") != _digest(tensors, metadata["position"]):
        _LOG.warning("starting over: %s was damaged since it was written", file)
        return None
    expected = {
        f"{kind}.{name}": parameter.shape for kind in ("parameter", *_MOMENTS) for name, parameter in parameters.items()
    }
    if {name: tensor.shape for name, tensor in tensors.items()} != expected:
        _LOG.warning("starting over: %s is of other parameters", file)
        return None
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(tensors[f"parameter.{name}"])
        moments = {moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in _MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(position["step"])), **moments}
    return position
