"""Write a safetensors file whose shapes are known before its tensors: header first, then one tensor at a time."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nirvana.weights import FLOAT_TYPES

_SYNC_BYTES = 16_000_000


def stream_safetensors(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], read: Callable[[str], Tensor]
) -> str:
    """Write one file; memory is two tensors, for the next is made while one is written.

    Args:
        path: The file.
        tensors: Type as safetensors spells it, and shape, by name.
        read: Returns a tensor of that type and shape.

    Returns:
        Hex SHA-256 of the file's bytes, taken while they are written: a disk that changes them is told by it.

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
    # unbuffered: tensors go to the file as they are; synced along the way, so that little is left for the end
    with (
        path.open("wb", buffering=0) as file,
        ThreadPoolExecutor(1, thread_name_prefix="sync") as pool,
        ThreadPoolExecutor(1, thread_name_prefix="digest") as digesting,
    ):
        encoded = len(encoded).to_bytes(8, "little") + encoded
        digest = hashlib.sha256(encoded)
        file.write(encoded)
        written: int = 0
        syncing: Future[Any] = pool.submit(bool)
        for tensor in _ahead(read, ordered):
            # not numpy's tofile: on a full disk its error does not say which
            content = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
            digested = digesting.submit(digest.update, content)
            while content:  # a raw write may be short
                content = content[file.write(content) :]
            digested.result()
            written += tensor.nbytes
            if written >= _SYNC_BYTES and syncing.done():
                syncing.result()  # a failed write-back is told once
                written, syncing = 0, pool.submit(os.fdatasync, file.fileno())
        syncing.result()
    return digest.hexdigest()


def _ahead(read: Callable[[str], Tensor], names: Iterable[str]) -> Iterator[Tensor]:
    """Yield tensors in order, the next already under way in a thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="next-tensor") as pool:
        pending: Future[Tensor] | None = None
        for name in names:
            following = pool.submit(read, name)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()
