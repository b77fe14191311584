"""Weights in few bits: what is left of a matrix after the round trip, and the bytes that it takes in between.

Symmetric rounding to the nearest step, one scale a row of the matrix (an output channel) or a group of a row's
columns; scales are float16 and count. Only weights are stored so: they are multiplied out again before use, and
activations stay as they are. It is what a file would hold, not how fast one would run: no integer kernel is called.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

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
