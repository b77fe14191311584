"""Cut the parameters of kept units out of dense ones: the one operation that KL scoring and surgery share."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nirvana.architectures.site import Site, Slot

Pruned = list[tuple[Slot, NDArray[np.int64]]]
"""Slots of one parameter, each with the numbers of its units that leave."""


def pruned_slots(sites: Iterable[Site], keep: Mapping[str, NDArray[np.int64]]) -> dict[str, Pruned]:
    """Return what leaves each parameter, by its name; those that stay whole are not there."""
    result: dict[str, Pruned] = {}
    for site in sites:
        units = np.setdiff1d(np.arange(site.units), keep[site.name], assume_unique=True)
        for slot in site.slots if len(units) else ():
            result.setdefault(slot.parameter, []).append((slot, units))
    return result


def kept_indices(pruned: Pruned, dim: int, size: int) -> NDArray[np.int64]:
    """Return which of `size` indices along a dimension stay."""
    staying = np.ones(size, dtype=bool)
    for slot, units in pruned:
        if slot.dim == dim:
            staying[slot.indices(units)] = False
    return np.flatnonzero(staying)


class Slicer:
    """What a plan does to each parameter, by name."""

    def __init__(self, sites: Iterable[Site], keep: Mapping[str, NDArray[np.int64]]):
        self._pruned = pruned_slots(sites, keep)

    def _kept(self, name: str, shape: tuple[int, ...]) -> dict[int, NDArray[np.int64]]:
        """Return the indices that stay along each dimension that loses some."""
        pruned = self._pruned.get(name, [])
        return {dim: kept_indices(pruned, dim, shape[dim]) for dim in sorted({slot.dim for slot, _ in pruned})}

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that a parameter of the given dense shape has afterwards."""
        kept = self._kept(name, shape)
        return tuple(len(kept[dim]) if dim in kept else size for dim, size in enumerate(shape))

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """Return the kept part of a parameter; the tensor itself where nothing leaves."""
        for dim, kept in self._kept(name, tensor.shape).items():
            tensor = tensor.index_select(dim, torch.from_numpy(kept).to(tensor.device))
        return tensor
