"""Saliency |W · ∂f/∂W|: channel sums in one layer-major walk, then unit sums.

The absolute value is taken after the gradient of the whole calibration set is summed: taking it a microbatch at a
time changes which units stay. Going through the layers from the last to the first, and through all microbatches
within each, makes microbatches exact while only one layer's gradient exists at a time.

Source: NIRVANA (arXiv 2509.14230), unit saliency.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nirvana.architectures.site import Site, Slot
from nirvana.errors import InputError
from nirvana.objective import objective_and_gradient
from nirvana.walk import Part, Stack, TokenIds, microbatches, walk_forward


@dataclass(frozen=True)
class ChannelSaliency:
    """Saliency summed over rows or columns, before anything is known of units or ratios."""

    objective: float
    """f on the calibration set."""
    sums: dict[str, Float[Tensor, " channels"]]
    """One float32 vector on the CPU a weight slot, by `channel_key`, in units of f."""


def channel_key(slot: Slot) -> str:
    """Return the name of a slot's vector: parameter and dimension."""
    return f"{slot.parameter}:{slot.dim}"


def channel_saliency(
    stack: Stack,
    ids: TokenIds,
    microbatch: int = 2,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> ChannelSaliency:
    """Return the channel saliency of a calibration set.

    Args:
        ids: Calibration sequences, all of one length.
        microbatch: Sequences a forward; changes memory, not the result beyond rounding.
        on_layer: Called after each layer of each of the two walks, for progress.

    Raises:
        InputError: If a token id is out of range, or a gradient is not finite (the message names the parameter).

    Source: NIRVANA (arXiv 2509.14230), unit saliency.
    """
    stack.check_ids(ids)
    if microbatch < 1:
        raise InputError(f"microbatch: expected at least 1 sequence, got {microbatch}; choose e.g. 2")
    inputs = _layer_inputs(stack, ids, microbatch, on_layer)
    objective, upstream = 0.0, []
    for hidden in inputs.pop():
        value, gradient = objective_and_gradient(stack, hidden, ids.shape[0])
        objective += value
        upstream.append(gradient)
    sums: dict[str, Tensor] = {}
    slots = weight_slots_by_layer(stack.architecture.sites())
    for layer in reversed(range(stack.num_layers)):
        sums |= _layer_saliency(stack, layer, slots[layer], inputs.pop(), upstream)
        on_layer(layer)
    return ChannelSaliency(objective, sums)


def weight_slots_by_layer(sites: Iterable[Site]) -> dict[int, list[Slot]]:
    """Group the slots that carry saliency by layer."""
    result: dict[int, list[Slot]] = {}
    for site in sites:
        result.setdefault(site.layer, []).extend(site.weight_slots)
    return result


@torch.no_grad()
def _layer_inputs(stack: Stack, ids: TokenIds, microbatch: int, on_layer: Callable[[int], None]) -> list[list[Part]]:
    """Return what enters each layer and, last, what leaves the stack: `[layers + 1][microbatches]`."""
    inputs = [[stack.embed(ids[part]) for part in microbatches(ids.shape[0], microbatch)]]
    for layer in range(stack.num_layers):
        inputs.append(walk_forward(stack, inputs[-1], layer))
        on_layer(layer)
    return inputs


def _layer_saliency(
    stack: Stack, layer: int, slots: list[Slot], inputs: list[Part], upstream: list[Part]
) -> dict[str, Tensor]:
    """Backpropagate all microbatches through one layer; `upstream` is replaced by the gradient at its inputs."""
    weights = stack.layer_weights(layer)
    scored = {slot.parameter for slot in slots}
    leaves = {name: weight.detach().requires_grad_(name in scored) for name, weight in weights.items()}
    for index, part in enumerate(inputs):
        hidden = part.detach().requires_grad_()
        with torch.enable_grad():
            output = stack.run_layer(layer, hidden, stack.layer_arguments(hidden)[layer], leaves)
        # accumulates into the .grad of the weights in place: the sum over the whole calibration set
        torch.autograd.backward(output, upstream[index])
        assert hidden.grad is not None
        upstream[index] = hidden.grad
        inputs[index] = hidden.grad  # frees the activation: the walk never returns to it
    sums = {channel_key(slot): _channel_sums(leaves[slot.parameter], slot) for slot in slots}
    for slot in slots:
        if not torch.isfinite(sums[channel_key(slot)]).all():
            raise InputError(_not_finite(stack, slot.parameter))
    return sums


def _channel_sums(weight: Tensor, slot: Slot) -> Float[Tensor, " channels"]:
    gradient = weight.grad
    assert gradient is not None
    saliency = torch.mul(weight.detach(), gradient).abs_()
    others = [dim for dim in range(saliency.ndim) if dim != slot.dim]
    return saliency.sum(dim=others).cpu()


def _not_finite(stack: Stack, parameter: str) -> str:
    """Say what is broken: the first weight of the walk that is not finite, else where the gradient overflowed."""
    architecture = stack.architecture
    layers = [
        name for layer in range(stack.num_layers) for name in stack.weights.under(architecture.layer_prefix(layer))
    ]
    norm = stack.weights.under(architecture.norm_prefix)
    for name in (architecture.embedding_parameter, *layers, *norm, stack.head_parameter):
        if not torch.isfinite(stack.weights[name]).all():
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
            owned = sums[channel_key(slot)][slot.base : slot.base + site.units * slot.block]
            total += owned.to(torch.float64).view(site.units, slot.block).sum(dim=1)
        result[site.name] = total.to(torch.float32)
    return result
