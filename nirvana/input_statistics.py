"""Mean and second moment of what each output projection reads, from one forward walk of the dense model.

An output projection (`nirvana.projections`) is the last thing a unit passes on its way into the residual stream.
Methods without gradients judge a unit by what it brings there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nirvana.architectures.architecture import Streams
from nirvana.projections import OutputProjection, output_projections, recorded_inputs
from nirvana.walk import Ids, Stack, small_batches


@dataclass(frozen=True)
class InputStatistics:
    """Float64 vectors on the CPU, one value an input channel, by the projection's parameter name."""

    mean: Mapping[str, Float[Tensor, " channels"]]
    second_moment: Mapping[str, Float[Tensor, " channels"]]
    """Mean of x², over all positions of all sequences."""

    def variance(self, parameter: str) -> Float[Tensor, " channels"]:
        """Return the mean of (x − mean)²."""
        return (self.second_moment[parameter] - self.mean[parameter] ** 2).clamp_min(0.0)


@torch.no_grad()
def input_statistics(stack: Stack, ids: Ids, on_layer: Callable[[int], None] = lambda layer: None) -> InputStatistics:
    """Collect the statistics of every output projection.

    Args:
        ids: Calibration sequences, all of one length.
        on_layer: Called after each layer, for progress.

    Raises:
        InputError: If a token id is out of range, or an output projection is not a module of its own (experts that
            run as one tensor).
    """
    stack.check_ids(ids)
    projections = output_projections(stack.architecture)
    sums = {projection.name: _Sums() for of_layer in projections.values() for projection in of_layer}
    parts = small_batches(stack, ids)
    for layer, weights in stack.layers(range(stack.num_layers)):
        parts = _walk_layer(stack, layer, weights, parts, projections[layer], sums)
        on_layer(layer)
    mean = {name: (each.first / each.positions).cpu() for name, each in sums.items()}
    return InputStatistics(mean, {name: (each.second / each.positions).cpu() for name, each in sums.items()})


class _Sums:
    """Sums over positions, in float64: a variance is the small difference of two of them."""

    def __init__(self) -> None:
        self.positions = 0
        self.first = self.second = torch.zeros(1, dtype=torch.float64)

    def add(self, inputs: Tensor) -> None:
        values = inputs.flatten(0, -2).double()
        self.positions += len(values)
        self.first = self.first.to(values.device) + values.sum(dim=0)
        self.second = self.second.to(values.device) + values.square().sum(dim=0)


def _walk_layer(
    stack: Stack,
    layer: int,
    weights: Mapping[str, Tensor],
    parts: Sequence[Streams],
    projections: Sequence[OutputProjection],
    sums: Mapping[str, _Sums],
) -> list[Streams]:
    architecture, outputs = stack.architecture, []
    module, fused = architecture.layer_module(layer), architecture.fuse(layer, weights)
    paths = {projection.name: projection.path_in(architecture) for projection in projections}
    with recorded_inputs(module, list(paths.values())) as seen:
        for part in parts:
            arguments = architecture.layer_arguments(part)[layer]
            outputs.append(architecture.run_layer(layer, part, arguments, fused, module))
            for name, path in paths.items():
                sums[name].add(seen[path])
    return outputs
