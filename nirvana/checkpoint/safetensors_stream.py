"""Write a safetensors file whose shapes are known before its tensors: header first, then one tensor at a time."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from nirvana.weights import FLOAT_TYPES


def stream_safetensors(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], read: Callable[[str], Tensor]
) -> None:
    """Write one file; memory is one tensor.

    Args:
        path: The file.
        tensors: Type as safetensors spells it, and shape, by name.
        read: Returns a tensor of that type and shape.

    Source: the format's own description, https://github.com/huggingface/safetensors#format.
    """
    # Wide types first: every tensor then starts at a multiple of its item size.
    ordered = sorted(tensors, key=lambda name: (-FLOAT_TYPES[tensors[name][0]], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in ordered:
        dtype, shape = tensors[name]
        end = offset + math.prod(shape) * FLOAT_TYPES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in ordered:
            # not numpy's tofile: on a full disk its error does not say which
            file.write(read(name).contiguous().view(-1).view(torch.uint8).numpy().data)
