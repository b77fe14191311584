"""Weights in few bits: what is left of a matrix after the round trip, and the bytes that it takes in between.

Symmetric rounding to the nearest step, one scale a row of the matrix (an output channel) or a group of a row's
columns; scales are float16 and count. Only weights are stored so: they are multiplied out again before use, and
activations stay as they are. It is what a file would hold, not how fast one would run: no integer kernel is called.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from nirvana.allocation import Keep
from nirvana.architectures.site import Site
from nirvana.slicing import Slicer
from nirvana.walk import FORWARD_TOKENS, Hidden, Stack, TokenIds, microbatches, part_of
from nirvana.weights import FLOAT_TYPES

SCALE_BYTES = 2
"""A float16."""


@dataclass(frozen=True)
class Precision:
    """How many bits a weight takes, and which weights share a scale."""

    name: str
    bits: int
    group: int | None
    """Columns of a row that share a scale, the last group of a row maybe fewer; None: the whole row."""


STORED = "stored"
"""The name of what is not quantised: every parameter as the checkpoint has it."""
PRECISIONS = {each.name: each for each in (Precision("int8", 8, None), Precision("int4", 4, 64))}


def round_trip(weight: Float[Tensor, "*rows columns"], precision: Precision) -> Float[Tensor, "*rows columns"]:
    """Return what a matrix is after it was stored in few bits: whole steps of −L … L, L = 2^(bits−1) − 1, times scale.

    A scale is the largest magnitude of those that share it, over L, in float16. Halves round to even.
    """
    largest_step, columns = 2 ** (precision.bits - 1) - 1, weight.shape[-1]
    group = precision.group or columns
    grouped = nn.functional.pad(weight.float(), (0, -columns % group)).unflatten(-1, (-1, group))
    scale = (grouped.abs().amax(dim=-1, keepdim=True) / largest_step).to(torch.float16).float()
    # a scale that float16 rounds to 0 leaves 0
    steps = (grouped / scale.where(scale > 0, 1)).round().clamp(-largest_step, largest_step)
    return (steps * scale).flatten(-2)[..., :columns]


def quantised_bytes(shape: Sequence[int], precision: Precision) -> int:
    """Return the bytes of a matrix of that shape: whole bytes a row, then its scales."""
    *rows, columns = shape
    scales = math.ceil(columns / (precision.group or columns))
    return math.prod(rows) * (math.ceil(columns * precision.bits / 8) + SCALE_BYTES * scales)


@torch.no_grad()
def quantised_hidden_states(
    stack: Stack, keep: Keep, ids: TokenIds, updates: Mapping[str, Tensor], precision: Precision
) -> Hidden:
    """Return what the head reads where the block matrices that are left were rounded: a layer at a time.

    Args:
        stack: The dense model.
        keep: Kept units by site name.
        ids: Sequences.
        updates: What least squares solved for, by name; a bias would not be read.
        precision: How matrices are rounded.
    """
    sites = stack.architecture.sites()
    slicer, matrices = Slicer(sites, keep), block_matrices(sites)
    kept_units = {name: len(indices) for name, indices in keep.items()}
    rows = microbatches(len(ids), max(1, FORWARD_TOKENS // ids.shape[1]))
    parts = [stack.embed(part_of(ids, each)) for each in rows]
    for layer, weights in stack.layers(range(stack.num_layers)):
        left = {name: updates[name] if name in updates else slicer.apply(name, weights[name]) for name in weights}
        left |= {name: round_trip(left[name], precision) for name in left if name in matrices}
        fused = stack.architecture.fuse(layer, left)
        parts = [stack.run_layer(layer, part, fused, kept_units) for part in parts]
        del left, fused
    return torch.cat([stack.head_input(part, updates) for part in parts])


def block_matrices(sites: Sequence[Site]) -> frozenset[str]:
    """Return the names of the matrices that units own rows or columns of."""
    return frozenset(slot.parameter for site in sites for slot in site.weight_slots)


def stored_bytes(stack: Stack, shapes: Mapping[str, tuple[int, ...]], precision: Precision | None) -> int:
    """Return the bytes of all parameters: block matrices at a precision, whatever else as the checkpoint stores it.

    Args:
        stack: The dense model, whose types count.
        shapes: By parameter, after slicing.
        precision: None: block matrices as stored, too.
    """
    matrices = block_matrices(stack.architecture.sites())

    def size(name: str, shape: tuple[int, ...]) -> int:
        if precision is not None and name in matrices:
            return quantised_bytes(shape, precision)
        return int(np.prod(shape)) * FLOAT_TYPES[stack.weights.dtype(stack.stored_name(name))]

    return sum(size(name, shape) for name, shape in shapes.items())
