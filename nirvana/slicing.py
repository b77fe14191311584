"""Cut the parameters of kept units out of dense ones: the one operation that KL scoring and surgery share."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nirvana.architectures.site import Site, Slot


class Slicer:
    """What a plan does to each parameter, by name."""

    def __init__(self, sites: Iterable[Site], keep: Mapping[str, NDArray[np.int64]]):
        self._cuts: dict[str, list[tuple[Slot, NDArray[np.int64]]]] = {}
        for site in sites:
            kept = keep[site.name]
            condemned = np.setdiff1d(np.arange(site.units), kept, assume_unique=True)
            if len(condemned):
                for slot in site.slots:
                    self._cuts.setdefault(slot.parameter, []).append((slot, condemned))

    def _staying(self, slots: list[tuple[Slot, NDArray[np.int64]]], size: int) -> NDArray[np.int64]:
        staying = np.ones(size, dtype=bool)
        for slot, condemned in slots:
            first = slot.base + condemned * slot.block
            staying[(first[:, None] + np.arange(slot.block)).ravel()] = False
        return np.flatnonzero(staying)

    def _by_dimension(self, name: str) -> dict[int, list[tuple[Slot, NDArray[np.int64]]]]:
        cuts: dict[int, list[tuple[Slot, NDArray[np.int64]]]] = {}
        for slot, condemned in self._cuts.get(name, ()):
            cuts.setdefault(slot.dim, []).append((slot, condemned))
        return cuts

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that a parameter of the given dense shape has afterwards."""
        result = list(shape)
        for dim, cuts in self._by_dimension(name).items():
            result[dim] = len(self._staying(cuts, shape[dim]))
        return tuple(result)

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """Return the kept part of a parameter; the tensor itself where nothing leaves."""
        for dim, cuts in sorted(self._by_dimension(name).items()):
            index = torch.from_numpy(self._staying(cuts, tensor.shape[dim])).to(tensor.device)
            tensor = tensor.index_select(dim, index)
        return tensor
