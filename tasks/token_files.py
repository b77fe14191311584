"""The one reader of candidates.safetensors and heldout.safetensors."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nirvana.errors import InputError

NAMES = ("input_ids", "decoder_input_ids")
"""What the encoder (or the only stack) reads; what the decoder of an encoder-decoder reads."""


def read_ids(path: Path | str) -> tuple[Tensor, ...]:
    """Read the token ids of a model's stacks, in the order that a walk takes them.

    Returns:
        One tensor for a decoder-only model, `[..., sequences, tokens]`; for an encoder-decoder a second one of the
        same leading dimensions.

    Raises:
        InputError: If the file cannot be read or holds something else.
    """
    remedy = "run `dvc repro sample_pool` to make it anew"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: expected token ids, got a file that cannot be read ({error}); {remedy}") from error
    ids = tuple(tensors[name] for name in NAMES if name in tensors)
    if "input_ids" not in tensors or any(part.shape[:-1] != ids[0].shape[:-1] for part in ids):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise InputError(f"{path}: expected input_ids, with decoder_input_ids alike or without, got {shapes}; {remedy}")
    return ids
