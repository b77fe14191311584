"""Read a model's tensors by name from its safetensors files, without loading the model."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nirvana.errors import InputError
from nirvana.fields import shortened
from nirvana.files import read_json, sha256_file

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# no separator of any system and short enough for any: a name can then only mean a file of the same directory
_SHARD_NAME = re.compile(r"[\w.+= -]{1,200}\.safetensors", re.ASCII)
FLOAT_TYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes an element of the types that weights may have, as safetensors spells them."""


def weight_files(model_directory: Path | str) -> list[Path]:
    """Return the safetensors files of a model directory, in name order.

    A shard must lie in the directory by its name. Links are followed: the cache of Hugging Face consists of them, and
    only someone who can write here can make one.

    Raises:
        InputError: If there are none, the index is unreadable, or a shard it names is missing or lies elsewhere.
    """
    directory = Path(model_directory)
    index = directory / INDEX_NAME
    whole = (directory / WEIGHTS_NAME).is_file()
    # as transformers: a whole file goes before an index
    names = _shard_names(index) if index.is_file() and not whole else [WEIGHTS_NAME]
    files = [directory / name for name in names]
    for file in files:
        if not file.is_file():
            raise InputError(
                f"{directory}: expected the weight file {file.name}, found no such file; fetch the model again "
                "(pickled weights are not read: convert them with save_pretrained first)"
            )
    return files


def _shard_names(index: Path) -> list[str]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: expected a weight_map that names the weight files; fetch the model again")
    for name in weight_map.values():
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise InputError(
                f"{index}: expected file names beside it that end in .safetensors, got {shortened(name)}; "
                "do not use this model"
            )
    return sorted(set(weight_map.values()))


def model_digest(model_directory: Path | str) -> str:
    """Return `sha256:<hex>` over a model's configuration and weight files: what a plan is bound to."""
    directory = Path(model_directory)
    digest = hashlib.sha256()
    for file in [directory / "config.json", *weight_files(directory)]:
        digest.update(f"{file.name}\0{sha256_file(file)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


class WeightFiles:
    """The tensors of a model directory, memory-mapped.

    A tensor that is asked for is a view of the file's pages: two processes that read one model share its memory.
    """

    def __init__(self, model_directory: Path | str):
        self._files: dict[str, Any] = {}
        self.file_of: dict[str, Path] = {}
        for path in weight_files(model_directory):
            try:
                handle = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{path}: expected a whole safetensors file, got one that cannot be read ({str(error)[:200]}); "
                    "fetch the model again"
                ) from error
            for name in handle.keys():
                self._files[name] = handle
                self.file_of[name] = path

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def _file(self, name: str) -> Any:
        if name not in self._files:
            raise InputError(
                f"expected a tensor {name!r} in the model's safetensors files, found none; "
                "the configuration and the weights do not belong together: fetch the model again"
            )
        return self._files[name]

    def __getitem__(self, name: str) -> Tensor:
        """Return one tensor as stored.

        Raises:
            InputError: If the model has no tensor of that name (here and below).
        """
        return self._file(name).get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return tuple(self._file(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return a tensor's type as the file's header spells it, e.g. `F32`, `BF16`."""
        return str(self._file(name).get_slice(name).get_dtype())

    def under(self, prefix: str) -> list[str]:
        """Return the names that begin with `prefix`, in order."""
        return sorted(name for name in self._files if name.startswith(prefix))


def to_compute(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a stored tensor as float32 on `device`; no copy where it is that already."""
    return tensor.to(device=device, dtype=torch.float32)
