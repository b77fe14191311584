"""Where units live: the abstraction that scoring, slicing, masking and counting share.

A *unit* is the smallest structure that can leave a model without breaking it: a KV group (one KV head, the query
heads that read it and the output columns they feed) or an MLP neuron. A *site* is a place that holds units of one
kind, such as the KV groups of one layer. A *slot* says which block of which parameter a unit owns there::

                     unit 0      unit 1      unit 2
    q_proj rows   [q0 q1 q2 ] [q3 q4 q5 ] [q6 q7 q8 ]     block = 3 * head_dim
    k_proj rows   [k0       ] [k1       ] [k2       ]     block = head_dim
    v_proj rows   [v0       ] [v1       ] [v2       ]     block = head_dim
    o_proj cols   [o0 o1 o2 ] [o3 o4 o5 ] [o6 o7 o8 ]     block = 3 * head_dim
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Module = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Slot:
    """Unit u owns `[base + u * block, base + (u + 1) * block)` along dimension `dim` of `parameter`."""

    parameter: str
    """Full name of the parameter in the checkpoint."""
    dim: int
    block: int
    """Indices a unit owns along `dim`."""
    width: int
    """Elements behind one index along `dim`: the size of the other dimension; 1 for a bias."""
    base: int = 0
    is_bias: bool = False
    """Biases are sliced with their unit but carry no saliency and do not count as block weights."""
    stored_as: str | None = None
    """The parameter that a dense checkpoint holds instead, where several layers read one: T5's relative position
    biases. A pruned checkpoint gives each layer its own slice; masking must leave the shared one alone."""

    def indices(self, units: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the indices along `dim` that some units own, unit by unit."""
        return (self.base + units[:, None] * self.block + np.arange(self.block)).ravel()

    def span(self, units: int) -> slice:
        """Return what the slot's units own of the indices along `dim`, `block` a unit."""
        return slice(self.base, self.base + units * self.block)


@dataclass(frozen=True)
class Site:
    """One layer's units of one kind."""

    name: str
    """Stable key, e.g. `layers.3.kv_group`."""
    module: Module
    layer: int
    units: int
    slots: tuple[Slot, ...]
    equal_with: str | None = None
    """Sites with the same key keep equally many units: the experts of a layer, which run as one tensor."""
    aligned_with: str | None = None
    """Sites with the same key keep the same indices where a stock checkpoint is asked for (`scope: uniform`)."""

    @property
    def weight_slots(self) -> tuple[Slot, ...]:
        """The slots that carry saliency and count as block weights."""
        return tuple(slot for slot in self.slots if not slot.is_bias)

    @property
    def weights_per_unit(self) -> int:
        """Block weights that leave with one unit."""
        return sum(slot.block * slot.width for slot in self.weight_slots)

    @property
    def weights(self) -> int:
        """Block weights of all units of the site."""
        return self.units * self.weights_per_unit
