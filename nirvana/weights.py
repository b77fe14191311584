"""Read a model's tensors by name from its safetensors files, without loading the model."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nirvana.directory_kind import Kind, kind_of_directory
from nirvana.errors import InputError
from nirvana.fields import shortened
from nirvana.files import read_json, sha256_file
from nirvana.weight_names import INDEX_NAME as INDEX_NAME
from nirvana.weight_names import WEIGHTS_NAME as WEIGHTS_NAME
from nirvana.weight_names import weight_names

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
    files = [file.name for file in directory.iterdir() if file.is_file()] if directory.is_dir() else []
    names = weight_names(files, lambda: read_json(directory / INDEX_NAME), str(directory))
    if not names:
        kind = kind_of_directory(directory) or Kind("no such file", "fetch the model again")
        raise InputError(
            f"{directory}: expected the weight file {WEIGHTS_NAME} or an index of others, found {kind.found}; "
            f"{kind.remedy}"
        )
    return [directory / name for name in names]


def model_digest(model_directory: Path | str) -> str:
    """Return `sha256:<hex>` over a model's configuration and weight files: what a plan is bound to."""
    directory = Path(model_directory)
    digest = hashlib.sha256()
    for file in [directory / "config.json", *weight_files(directory)]:
        digest.update(f"{file.name}\0{sha256_file(file)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


@dataclass(frozen=True)
class Stored:
    """Where a file keeps a parameter."""

    name: str
    """The tensor."""
    place: tuple[int | slice, ...] = ()
    """The part of it, where several parameters are fused in one: an index or a range for each leading dimension."""

    def cut(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the part in a tensor of the given shape."""
        places = zip(self.place, shape, strict=False)
        ranges = [len(range(*place.indices(size))) for place, size in places if isinstance(place, slice)]
        return (*ranges, *shape[len(self.place) :])


class WeightFiles:
    """The tensors of a model directory, memory-mapped.

    A tensor that is asked for is a view of the file's pages: two processes that read one model share its memory. Names
    are those in the files until `arrange` gives others.
    """

    def __init__(self, model_directory: Path | str):
        self.directory = Path(model_directory)
        self._files: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        for path in weight_files(model_directory):
            try:
                handle = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{path}: expected a whole safetensors file, got one that cannot be read ({str(error)[:200]}); "
                    "fetch the model again"
                ) from error
            for name in handle.keys():
                if name in self._files and not _equal(handle.get_tensor(name), self._files[name].get_tensor(name)):
                    raise InputError(
                        f"{path}: expected each tensor once, got another {name} than {self._paths[name].name} has; "
                        "the files are not of one model: fetch it again"
                    )
                self._files[name] = handle
                self._paths[name] = path
        self.arrange({name: Stored(name) for name in self._files})

    @property
    def layout(self) -> Mapping[str, Stored]:
        """Where each parameter lies, by the name it is asked for."""
        return self._layout

    def arrange(self, layout: Mapping[str, Stored]) -> None:
        """Give the tensors other names, such as those of the family's class; the files stay as they are."""
        self._layout = dict(layout)
        self.file_of = {name: self._paths[stored.name] for name, stored in layout.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._layout

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def _file(self, name: str) -> tuple[Any, Stored]:
        if name not in self._layout:
            raise InputError(
                f"{self.directory}: expected a tensor {name!r} in the model's safetensors files, found none"
                f"{self._listed_in(name)}; the configuration and the weights do not belong together: fetch the model "
                "again"
            )
        stored = self._layout[name]
        return self._files[stored.name], stored

    def _listed_in(self, name: str) -> str:
        """Say which file should hold a tensor, where the index knows."""
        try:
            shard = read_json(self.directory / INDEX_NAME)["weight_map"][name]
        except (InputError, KeyError, TypeError):
            return ""
        return f", although {INDEX_NAME} says that it is in {shortened(shard)}"

    def __getitem__(self, name: str) -> Tensor:
        """Return one tensor as stored.

        Raises:
            InputError: If the model has no tensor of that name (here and below).
        """
        file, stored = self._file(name)
        tensor: Tensor = file.get_tensor(stored.name)
        return tensor[stored.place] if stored.place else tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        file, stored = self._file(name)
        return stored.cut(tuple(file.get_slice(stored.name).get_shape()))

    def dtype(self, name: str) -> str:
        """Return a tensor's type as the file's header spells it, e.g. `F32`, `BF16`."""
        file, stored = self._file(name)
        return str(file.get_slice(stored.name).get_dtype())

    def under(self, prefix: str) -> list[str]:
        """Return the names that begin with `prefix`, in order."""
        return sorted(name for name in self._layout if name.startswith(prefix))


def _equal(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are the same bytes."""
    same = one.dtype == other.dtype and one.shape == other.shape
    return same and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def to_compute(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a stored tensor as float32 on `device`; no copy where it is that already."""
    return tensor.to(device=device, dtype=torch.float32)
