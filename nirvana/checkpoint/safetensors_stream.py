"""Safetensors files whose shapes are known before their tensors: header first, then the tensors, in any order."""

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

from nirvana.files import write_json
from nirvana.weights import FLOAT_TYPES, INDEX_NAME, WEIGHTS_NAME

Described = Mapping[str, tuple[str, tuple[int, ...]]]
"""Type as safetensors spells it, and shape, by name."""

_SYNC_BYTES = 16_000_000


def described_bytes(tensors: Described) -> int:
    """Return the bytes of all tensors."""
    return sum(math.prod(shape) * FLOAT_TYPES[dtype] for dtype, shape in tensors.values())


def stream_safetensors(path: Path, tensors: Described, read: Callable[[str], Tensor]) -> str:
    """Write one file, tensor after tensor; see `SafetensorsFile.complete`."""
    return SafetensorsFile(path, tensors).complete(read)


class SafetensorsFile:
    """One file that has its header, and the tensors that were put into it.

    Args:
        path: The file.
        tensors: What it will hold.

    Source: the format's own description, https://github.com/huggingface/safetensors#format.
    """

    def __init__(self, path: Path, tensors: Described):
        # Wide types first: every tensor then starts at a multiple of its item size.
        ordered = sorted(tensors, key=lambda name: (-FLOAT_TYPES[tensors[name][0]], name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in ordered:
            dtype, shape = tensors[name]
            end = offset + described_bytes({name: tensors[name]})
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._header = len(encoded).to_bytes(8, "little") + encoded
        self._path, self._put = path, set[str]()
        self._spans = {
            name: range(*(len(self._header) + end for end in header[name]["data_offsets"]))  # type: ignore[index]
            for name in ordered
        }
        path.write_bytes(self._header)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its place."""
        with self._path.open("r+b", buffering=0) as file:
            _write(file.fileno(), tensor, self._spans[name].start)
        self._put.add(name)

    def complete(self, read: Callable[[str], Tensor]) -> str:
        """Write the tensors that are still missing; memory is two of them, for the next is made while one is written.

        Args:
            read: Returns a tensor of the type and shape that was said.

        Returns:
            Hex SHA-256 of the file's bytes, taken while they are written: a disk that changes them is told by it. What
            had been put is read for it.
        """
        digest = hashlib.sha256(self._header)
        made = _ahead(read, [name for name in self._spans if name not in self._put])
        # unbuffered: tensors go to the file as they are; synced along the way, so that little is left for the end
        with (
            self._path.open("r+b", buffering=0) as file,
            ThreadPoolExecutor(1, thread_name_prefix="sync") as pool,
            ThreadPoolExecutor(1, thread_name_prefix="digest") as digesting,
        ):
            written: int = 0
            syncing: Future[Any] = pool.submit(bool)
            for name, span in self._spans.items():
                if name in self._put:
                    for start in range(span.start, span.stop, _SYNC_BYTES):
                        digest.update(os.pread(file.fileno(), min(_SYNC_BYTES, span.stop - start), start))
                    continue
                tensor = next(made)
                digested = digesting.submit(digest.update, _content(tensor))
                _write(file.fileno(), tensor, span.start)
                digested.result()
                written += tensor.nbytes
                if written >= _SYNC_BYTES and syncing.done():
                    syncing.result()  # a failed write-back is told once
                    written, syncing = 0, pool.submit(os.fdatasync, file.fileno())
            syncing.result()
        return digest.hexdigest()


class Shards:
    """The safetensors files of a checkpoint, and their index.

    Args:
        directory: Where they are.
        tensors: What they will hold.
        file_of: The file of each tensor, by name.
    """

    def __init__(self, directory: Path, tensors: Described, file_of: Mapping[str, str]):
        self._directory, self._tensors = directory, tensors
        self._file_of = {name: file_of[name] for name in tensors}
        self._files = {
            file: SafetensorsFile(directory / file, {name: tensors[name] for name in tensors if file_of[name] == file})
            for file in sorted(set(self._file_of.values()))
        }

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its place."""
        self._files[self._file_of[name]].put(name, tensor)

    def complete(self, read: Callable[[str], Tensor]) -> dict[str, str]:
        """Write what is missing, as `SafetensorsFile.complete`; return the SHA-256 of each file, by name."""
        digests = {name: file.complete(read) for name, file in self._files.items()}
        if list(digests) != [WEIGHTS_NAME]:  # a single shard of another name is found by its index only
            metadata = {"total_size": described_bytes(self._tensors)}
            write_json(self._directory / INDEX_NAME, {"metadata": metadata, "weight_map": self._file_of})
        return digests


def _content(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _write(file: int, tensor: Tensor, offset: int) -> None:
    content = _content(tensor)  # not numpy's tofile: on a full disk its error does not say which
    while content:  # a write may be short
        written = os.pwrite(file, content, offset)
        content, offset = content[written:], offset + written


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
