"""Files of token ids, and the digest by which a plan names them."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nirvana.errors import InputError
from nirvana.fields import shortened
from nirvana.walk import Ids, as_streams

NAMES = ("input_ids", "decoder_input_ids")
"""What the encoder (or the only stack) reads; what the decoder of an encoder-decoder reads."""
_REMEDY = "save token ids with safetensors.torch.save_file"


def stored_ids(path: Path | str, remedy: str = _REMEDY) -> tuple[Tensor, ...]:
    """Read the token ids of a model's stacks, in the order that a walk takes them.

    Args:
        path: A safetensors file.
        remedy: How errors end.

    Returns:
        One tensor for a decoder-only model, `[..., sequences, tokens]`; for an encoder-decoder a second one of the
        same leading dimensions.

    Raises:
        InputError: If the file cannot be read or holds something else.
    """
    try:
        if not Path(path).is_file():  # a pipe would wait for a writer
            raise FileNotFoundError("no such file")
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        cause = str(error)[:200]
        raise InputError(f"{path}: expected token ids, got a file that cannot be read ({cause}); {remedy}") from error
    ids = tuple(tensors[name] for name in NAMES if name in tensors)
    if "input_ids" not in tensors or any(part.shape[:-1] != ids[0].shape[:-1] for part in ids):
        shapes = shortened({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        raise InputError(f"{path}: expected input_ids, with decoder_input_ids alike or without, got {shapes}; {remedy}")
    return ids


def read_ids(path: Path | str) -> Ids:
    """Read one batch of sequences.

    Returns:
        One int64 tensor `[sequences, tokens]` a stack.

    Raises:
        InputError: If the file cannot be read, or holds anything but whole numbers in that shape.
    """
    ids = stored_ids(path)
    for name, part in zip(NAMES, ids, strict=False):
        if part.dtype != torch.int64 or part.ndim != 2:
            raise InputError(
                f"{path}: expected {name} as int64, [sequences, tokens], got {part.dtype}, {list(part.shape)}; "
                f"{_REMEDY}"
            )
    return ids


def calibration_digest(ids: Ids) -> str:
    """Return `sha256:<hex>` over token ids, stack by stack: their type, shape and values."""
    digest = hashlib.sha256()
    for part in as_streams(ids):
        values = part.cpu().numpy()
        digest.update(f"{values.dtype}{values.shape}".encode() + values.tobytes())
    return f"sha256:{digest.hexdigest()}"
