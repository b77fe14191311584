"""Saliency |W · ∂f/∂W|: channel sums in one layer-major walk, then unit sums.

The absolute value is taken after the gradient of the whole calibration set is summed: taking it a microbatch at a
time changes which units stay. Going through the layers from the last to the first, and through all microbatches
within each, makes microbatches exact while only one layer's gradient exists at a time.

Source: NIRVANA (arXiv 2509.14230), unit saliency.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from nirvana.architectures.architecture import Streams
from nirvana.architectures.site import Site, Slot
from nirvana.errors import InputError
from nirvana.objective import Objective, mean_largest_logit
from nirvana.walk import Ids, Memory, Stack, as_streams, microbatches, part_of, walk_forward


@dataclass(frozen=True)
class ChannelSaliency:
    """Saliency summed over rows or columns, before anything is known of units or ratios."""

    objective: float
    """Its value f on the calibration set."""
    sums: dict[str, Float[Tensor, " channels"]]
    """One float32 vector on the CPU a weight slot, by `channel_key`, in units of f."""


def channel_key(slot: Slot) -> str:
    """Return the name of a slot's vector: parameter and dimension."""
    return f"{slot.parameter}:{slot.dim}"


def channel_saliency(
    stack: Stack,
    ids: Ids,
    microbatch: int = 2,
    on_layer: Callable[[int], None] = lambda layer: None,
    memory: Memory = "lean",
    objective: Objective = mean_largest_logit,
) -> ChannelSaliency:
    """Return the channel saliency of a calibration set.

    Args:
        ids: Calibration sequences, all of one length.
        microbatch: Sequences a forward; changes memory, not the result beyond rounding.
        on_layer: Called after each layer of each of the two walks, for progress.
        memory: `lean` keeps each layer's input and computes the layer a second time; `fast` keeps what autograd
            saved. The same operations in the same order: the results are equal bit for bit.
        objective: The scalar f to differentiate; NIRVANA's unless said otherwise.

    Raises:
        InputError: If a token id is out of range, or a gradient is not finite (the message names the parameter).

    Source: NIRVANA (arXiv 2509.14230), unit saliency.
    """
    stack.check_ids(ids)
    if microbatch < 1:
        raise InputError(f"microbatch: expected at least 1 sequence, got {microbatch}; choose e.g. 2")
    if memory == "fast" and stack.execution == "streamed":
        raise InputError("memory fast keeps all layers' weights: expected execution resident, got streamed; use lean")
    slots = weight_slots_by_layer(stack.architecture.sites())
    runs: list[_LayerRun] = []
    sequences = as_streams(ids)[0].shape[0]
    rows_of = list(microbatches(sequences, microbatch))
    parts = [stack.embed(part_of(ids, rows)) for rows in rows_of]
    for layer, weights in stack.layers(range(stack.num_layers)):
        runs.append(_LayerRun(stack, layer, slots[layer], parts))
        with torch.no_grad():
            parts = runs[-1].keep(weights) if memory == "fast" else walk_forward(stack, parts, layer, weights)
        on_layer(layer)
    total, upstream = 0.0, []
    for index, streams in enumerate(parts):
        value, gradient = objective(stack, streams, part_of(ids, rows_of[index]), sequences)
        total += value
        upstream.append((None,) * (len(streams) - 1) + (gradient,))
        parts[index] = ()  # the head was the last to read them
    sums: dict[str, Tensor] = {}
    for layer, weights in stack.layers(reversed(range(stack.num_layers))):
        sums |= runs.pop().backward(weights, upstream)
        on_layer(layer)
    return ChannelSaliency(total, sums)


def weight_slots_by_layer(sites: Iterable[Site]) -> dict[int, list[Slot]]:
    """Group the slots that carry saliency by layer."""
    result: dict[int, list[Slot]] = {}
    for site in sites:
        result.setdefault(site.layer, []).extend(site.weight_slots)
    return result


Gradients = tuple[Tensor | None, ...]
"""∂f/∂stream of one microbatch; None where nothing downstream reads the stream."""


@dataclass
class _LayerRun:
    """One layer's pass over all microbatches: forward, then backward."""

    stack: Stack
    layer: int
    slots: list[Slot]
    inputs: list[Streams]
    _leaves: dict[str, Tensor] = field(default_factory=dict)
    _fused: dict[str, Tensor] = field(default_factory=dict)
    _kept: list[tuple[Streams, Streams]] = field(default_factory=list)

    def keep(self, weights: Mapping[str, Tensor]) -> list[Streams]:
        """Run forward and keep what autograd saves; return the outputs."""
        self._prepare(weights)
        self._kept = [self._forward(streams) for streams in self.inputs]
        return [tuple(stream.detach() for stream in outputs) for _, outputs in self._kept]

    def backward(self, weights: Mapping[str, Tensor], upstream: list[Gradients]) -> dict[str, Tensor]:
        """Backpropagate all microbatches; `upstream` is replaced by the gradients at the layer's inputs.

        Returns:
            The layer's channel sums.
        """
        if not self._kept:
            self._prepare(weights)
        for index, gradients in enumerate(upstream):
            leaves, outputs = self._kept[index] if self._kept else self._forward(self.inputs[index])
            reached = [(output, g) for output, g in zip(outputs, gradients, strict=True) if g is not None]
            # accumulates into the .grad of the weights in place: the sum over the whole calibration set
            torch.autograd.backward([output for output, _ in reached], [g for _, g in reached])
            upstream[index] = tuple(leaf.grad for leaf in leaves)
            self.inputs[index] = ()  # frees the activation: the walk never returns to it
            if self._kept:
                self._kept[index] = ((), ())
        self._unfuse()
        sums = {}
        for slot in self.slots:  # fused matrices have several slots and one vector
            key = channel_key(slot)
            if key not in sums:
                sums[key] = _channel_sums(self._leaves[slot.parameter], slot)
                if not torch.isfinite(sums[key]).all():
                    raise InputError(_not_finite(self.stack, slot.parameter))
        return sums

    def _prepare(self, weights: Mapping[str, Tensor]) -> None:
        scored = {slot.parameter for slot in self.slots}
        self._leaves = {name: weight.detach().requires_grad_(name in scored) for name, weight in weights.items()}
        with torch.enable_grad():
            fused = dict(self.stack.architecture.fuse(self.layer, self._leaves))
        if any(weight.grad_fn is not None for weight in fused.values()):
            # fused once, not a microbatch: the gradient gathers at the fused tensor and is handed back at the end
            self._fused = {name: weight for name, weight in fused.items() if weight.grad_fn is not None}
            fused |= {name: weight.detach().requires_grad_() for name, weight in self._fused.items()}
        self._parameters = fused

    def _forward(self, streams: Streams) -> tuple[Streams, Streams]:
        leaves = tuple(stream.detach().requires_grad_() for stream in streams)
        with torch.enable_grad():
            return leaves, self.stack.run_layer(self.layer, leaves, self._parameters)

    def _unfuse(self) -> None:
        for name, weight in self._fused.items():
            torch.autograd.backward(weight, self._parameters.pop(name).grad)
        self._fused = {}


def _channel_sums(weight: Tensor, slot: Slot) -> Float[Tensor, " channels"]:
    gradient = weight.grad
    assert gradient is not None
    saliency = torch.mul(weight.detach(), gradient).abs_()
    others = [dim for dim in range(saliency.ndim) if dim != slot.dim]
    return saliency.sum(dim=others).cpu()


def _not_finite(stack: Stack, parameter: str) -> str:
    """Say what is broken: the first weight of the walk that is not finite, else where the gradient overflowed."""
    architecture = stack.architecture
    layers = [name for layer in range(stack.num_layers) for name in architecture.layer_parameters(layer)]
    norm = [name for name in architecture.parameter_shapes if name.startswith(architecture.norm_prefix)]
    for name in (architecture.embedding_parameter, *layers, *norm, stack.head_parameter):
        if not torch.isfinite(stack.weights[stack.stored_name(name)]).all():
            return f"{name}: expected finite weights, got NaN or infinity; fetch the model again or choose another"
    return (
        f"{parameter}: expected a finite gradient of the objective, got NaN or infinity although all weights are "
        "finite; the model's activations overflow on this text: change the corpus or choose another model"
    )


def unit_saliency(sites: Iterable[Site], sums: Mapping[str, Tensor]) -> dict[str, Float[Tensor, " units"]]:
    """Sum channel saliency over everything that each unit owns.

    Args:
        sites: Where units live.
        sums: `ChannelSaliency.sums`.

    Returns:
        One float32 vector a site, by site name, in units of f: comparable between layers of one run.

    Source: NIRVANA (arXiv 2509.14230), unit saliency.
    """
    result = {}
    for site in sites:
        total = torch.zeros(site.units, dtype=torch.float64)
        for slot in site.weight_slots:
            total += (
                sums[channel_key(slot)][slot.span(site.units)].view(site.units, slot.block).to(torch.float64).sum(dim=1)
            )
        result[site.name] = total.to(torch.float32)
    return result


def idle_experts(sites: Iterable[Site], saliency: Mapping[str, NDArray[np.float32]]) -> list[str]:
    """Return the sites of experts that no token of the calibration has met: all of their units score zero.

    Such a score says nothing about the expert, and yet its units are the first to go.

    Args:
        sites: Where units live.
        saliency: Unit saliency by site name.
    """
    return [site.name for site in sites if site.equal_with is not None and not saliency[site.name].any()]
