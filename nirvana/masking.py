"""The dense model with the weights of all pruned units set to zero: what a pruned checkpoint has to compute.

It shares neither files nor the slicing with the checkpoint, but for the parameters of a compensated one that were
solved for: no plan says what is in them, so what is kept of them is the checkpoint's own.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nirvana.slicing import kept_indices, pruned_slots
from nirvana.walk import Stack
from nirvana.weights import WeightFiles


def masked_stack(
    dense: Stack, keep: Mapping[str, NDArray[np.int64]], updates: Mapping[str, Tensor] | None = None
) -> Stack:
    """Return a dense model as its plan masks it.

    Args:
        dense: The dense model; weights of the masked one are read as it reads its own.
        keep: Kept units by site name.
        updates: Output projections, sliced, which take the place of the kept columns; other parameters, in whole.
    """
    return replace(dense, weights=_MaskedWeights(dense, keep, updates or {}), _resident={})


class _MaskedWeights(WeightFiles):
    def __init__(self, dense: Stack, keep: Mapping[str, NDArray[np.int64]], updates: Mapping[str, Tensor]):
        super().__init__(dense.weights.directory)
        self.arrange(dense.weights.layout)
        self._updates = updates
        # what several layers share stays: a unit with no values and no output columns is silent without it
        self._pruned = {
            name: own
            for name, pruned in pruned_slots(dense.architecture.sites(), keep).items()
            if (own := [(slot, units) for slot, units in pruned if slot.stored_as is None])
        }

    def __getitem__(self, name: str) -> Tensor:
        """Return one tensor, a copy where it is masked or updated."""
        tensor = super().__getitem__(name)
        pruned = self._pruned.get(name, [])
        if not pruned and name not in self._updates:
            return tensor
        tensor = tensor.clone()
        for slot, units in pruned:
            tensor.index_fill_(slot.dim, torch.from_numpy(slot.indices(units)), 0)
        if name in self._updates:  # units are columns of an output projection
            tensor[..., torch.from_numpy(kept_indices(pruned, tensor.ndim - 1, tensor.shape[-1]))] = self._updates[name]
        return tensor
