"""Let the kept units absorb what the removed ones did, in closed form.

The dense and the pruned stack are walked together. At each output projection W with kept columns, with X what enters
it on the pruned path and Y what it would have to write for the residual stream to become the dense one:

    ΔW = argmin ‖X (W + ΔW)ᵀ − Y‖² + λ ‖ΔW‖²,   λ = ridge · mean diagonal of XᵀX

solved in float64 from the Gram matrix. No gradient, one pass, one layer in memory at a time. Errors of earlier layers
are part of Y, so later layers correct them.

What is left over by then is noise to the head, which makes the model surer than it should be. So the last norm's gain
is scaled as well: one factor, by least squares toward what the dense head reads, on sequences that the matrices were
not fitted on (on their own ones the noise looks smaller than it is; a factor a channel would fit noise there).

Sources: He et al. 2017, "Channel Pruning" (arXiv 1707.06168), least squares over kept channels; docs/concepts.md for
the sequential target.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nirvana.architectures.architecture import Streams
from nirvana.errors import InputError
from nirvana.projections import OutputProjection, Reached, output_projections, recorded_inputs, recorded_outputs
from nirvana.slicing import Slicer
from nirvana.walk import FORWARD_TOKENS, Ids, Stack, as_streams, microbatches, part_of

RIDGE = 0.3
"""λ relative to the mean diagonal of the Gram matrix (docs/notebook.md)."""
_FOR_THE_GAIN = 8
"""Every n-th microbatch is kept for the last norm's gain, where there are that many."""


def compensate(
    stack: Stack,
    keep: Mapping[str, NDArray[np.int64]],
    ids: Ids,
    ridge: float = RIDGE,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the output projections of the pruned model with their kept columns solved for, then the last norm's gain.

    Args:
        stack: The dense model.
        keep: Kept units by site name.
        ids: Text to fit on; a few thousand tokens a thousand kept columns.
        ridge: Strength of the pull toward the columns as they were.
        on_layer: Called after each layer, for progress.

    Yields:
        Parameter name and values in float32, sliced as in the pruned checkpoint; those that changed.

    Raises:
        InputError: If a token id is out of range, the ridge is not above 0, the family's units have no output
            projection of their own, or activations are not finite.
    """
    stack.check_ids(ids)
    if not (ridge > 0 and np.isfinite(ridge)):
        raise InputError(f"ridge: expected a finite number above 0, got {ridge}; choose e.g. {RIDGE}")
    architecture = stack.architecture
    projections, slicer = output_projections(architecture), Slicer(architecture.sites(), keep)
    kept_units = {name: len(indices) for name, indices in keep.items()}
    sequences, length = as_streams(ids)[0].shape
    rows = list(microbatches(sequences, max(1, FORWARD_TOKENS // length)))
    apart = set(range(_FOR_THE_GAIN - 1, len(rows), _FOR_THE_GAIN))
    with torch.no_grad():
        dense = [stack.embed(part_of(ids, each)) for each in rows]
        pruned = list(dense)
    for layer, weights in stack.layers(range(stack.num_layers)):
        with torch.no_grad():
            pair = _LayerPair(stack, layer, weights, slicer, kept_units, projections[layer])
            dense, pruned, solved = pair.run(dense, pruned, ridge, apart)
        yield from solved.items()
        on_layer(layer)
    if apart:
        with torch.no_grad():
            yield from _gain(stack, [dense[index] for index in apart], [pruned[index] for index in apart])


def _gain(stack: Stack, dense: list[Streams], pruned: list[Streams]) -> Iterator[tuple[str, Tensor]]:
    """Yield the last norm's weight such that what the head reads is scaled by one factor."""
    product, square = 0.0, torch.finfo(torch.float32).tiny
    for of_dense, of_pruned in zip(dense, pruned, strict=True):
        goal, given = (stack.head_input(streams).double() for streams in (of_dense, of_pruned))
        product += float((goal * given).sum())
        square += float(given.square().sum())
    name, offset = f"{stack.architecture.norm_prefix}weight", stack.architecture.norm_offset
    yield name, ((stack.parameter(name).double() + offset) * (product / square) - offset).float()


class _LayerPair:
    """One layer of the dense and the pruned stack."""

    def __init__(
        self,
        stack: Stack,
        layer: int,
        weights: Mapping[str, Tensor],
        slicer: Slicer,
        kept_units: Mapping[str, int],
        projections: list[OutputProjection],
    ):
        self.stack, self.layer, self.projections = stack, layer, projections
        self.architecture = stack.architecture
        self.paths = [projection.path_in(self.architecture) for projection in projections]
        self.dense_weights = weights
        self.weights = {name: slicer.apply(name, weight) for name, weight in weights.items()}
        self.module = self.architecture.layer_module(layer, kept_units)

    def run(
        self, dense: list[Streams], pruned: list[Streams], ridge: float, apart: Collection[int]
    ) -> tuple[list[Streams], list[Streams], dict[str, Tensor]]:
        """Return the streams that leave the dense layer and the solved one, and the solved matrices.

        Args:
            dense: What enters the dense layer, a microbatch each.
            pruned: What enters the pruned one.
            ridge: See `compensate`.
            apart: Microbatches that are walked along but not fitted on.
        """
        # What the dense path writes at each projection, and what the pruned path lacks before it.
        written, dense_next = self._dense_writes(dense)
        stream, scale = self.architecture.written_stream(self.layer), self.architecture.residual_scale
        nothing = torch.zeros((), device=self.stack.device)  # a target of its own, where a norm comes between
        lacking = [
            nothing if scale is None else (whole[stream] - cut[stream]) / scale
            for whole, cut in zip(dense, pruned, strict=True)
        ]
        solved = {}
        for index, projection in enumerate(self.projections):
            entering = [self._entering(streams, index) for streams in pruned]
            target = [of_dense[index] + lack for of_dense, lack in zip(written, lacking, strict=True)]
            fitted = [index for index in range(len(entering)) if index not in apart]
            matrix = self._solve(projection, [entering[i] for i in fitted], [target[i] for i in fitted], ridge)
            self.weights[projection.name] = solved[projection.name] = matrix
            if scale is not None:
                lacking = [goal - x @ matrix.T for x, goal in zip(entering, target, strict=True)]
        if scale is None or not self.architecture.ends_in_addition(self.layer):
            fused = self.architecture.fuse(self.layer, self.weights)
            return dense_next, [self._run(self.module, streams, fused) for streams in pruned], solved
        pruned_next = [
            (*before[:stream], whole[stream] - lack * scale, *before[stream + 1 :])
            for before, whole, lack in zip(pruned, dense_next, lacking, strict=True)
        ]
        return dense_next, pruned_next, solved

    def _run(self, module: nn.Module, streams: Streams, fused: Mapping[str, Tensor]) -> Streams:
        arguments = self.architecture.layer_arguments(streams)[self.layer]
        return self.architecture.run_layer(self.layer, streams, arguments, fused, module)

    def _dense_writes(self, dense: list[Streams]) -> tuple[list[list[Tensor]], list[Streams]]:
        module = self.architecture.layer_module(self.layer)
        fused = self.architecture.fuse(self.layer, self.dense_weights)
        biases = [self.dense_weights.get(projection.bias_name) for projection in self.projections]
        written, following = [], []
        with recorded_outputs(module, self.paths) as seen:
            for streams in dense:
                following.append(self._run(module, streams, fused))
                outputs = [seen[path] for path in self.paths]
                written.append([x if bias is None else x - bias for x, bias in zip(outputs, biases, strict=True)])
        return written, following

    def _entering(self, streams: Streams, index: int) -> Tensor:
        """Return what enters a projection on the pruned path; those before it are solved already."""
        with recorded_inputs(self.module, [self.paths[index]], stop=True) as seen, suppress(Reached):
            self._run(self.module, streams, self.architecture.fuse(self.layer, self.weights))
        return seen[self.paths[index]]

    def _solve(
        self, projection: OutputProjection, entering: list[Tensor], target: list[Tensor], ridge: float
    ) -> Tensor:
        weight = self.weights[projection.name]
        gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
        moment = torch.zeros(weight.shape[1], weight.shape[0], dtype=torch.float64, device=weight.device)
        for x, goal in zip(entering, target, strict=True):
            x, missing = x.flatten(0, -2), (goal - x @ weight.T).flatten(0, -2)
            gram += x.T @ x
            moment += x.T @ missing
        penalty = ridge * gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        gram.diagonal().add_(penalty)
        change, failed = torch.linalg.solve_ex(gram, moment)
        if failed or not torch.isfinite(change).all():
            raise InputError(
                f"{projection.name}: expected finite activations to fit on, got NaN or infinity; the model's weights "
                "or activations overflow: fetch the model again or change the corpus"
            )
        return (weight.double() + change.T).float()
