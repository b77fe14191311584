"""Mask Fisher: what the KL divergence gains, to second order, when one unit leaves.

Put a mask m_u = 1 on each unit's output, draw the labels from the model's own distribution and backpropagate their
summed cross-entropy ℓ. Then F_u = E Σ (∂ℓ/∂m_u)² is the diagonal of the Fisher information of the masks, and
KL(dense‖without u) ≈ ½ F_u: in nats, comparable between attention and MLP. Only the gradients of activations are
needed, none of weights.

The sum may run over sequences, one mask each: then F_u is what the definition says, estimated from as many numbers as
there are sequences. Or over tokens, one mask each: what the removal at one token does to later ones through the same
unit counts as independent, and the estimate has a hundred times as many numbers to average. After compensation the
latter chooses better (docs/notebook.md), and it is the default.

Sources: Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers" (arXiv 2204.09656), mask Fisher;
Kunstner et al. 2019 (arXiv 1905.12558), why the labels have to be the model's own.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nirvana.architectures.architecture import Streams
from nirvana.errors import InputError
from nirvana.head import sampled_label_gradients
from nirvana.projections import OutputProjection, output_projections, recorded_inputs
from nirvana.walk import Ids, Stack, as_streams, microbatches, part_of, walk_forward

DRAWS = 2
"""Label sequences drawn a calibration sequence; each is one more backward pass through the layers."""
Masks = Literal["tokens", "sequences"]
"""What has a mask of its own."""

_Gradients = tuple[Tensor | None, ...]


def mask_fisher(
    stack: Stack,
    ids: Ids,
    microbatch: int = 2,
    draws: int = DRAWS,
    seed: int = 0,
    masks: Masks = "tokens",
    on_layer: Callable[[int], None] = lambda layer: None,
) -> dict[str, Float[Tensor, " units"]]:
    """Return ½ F_u of every unit, in nats a predicted token.

    Args:
        ids: Calibration sequences, all of one length.
        microbatch: Sequences a forward; changes memory, not the result beyond rounding.
        draws: Label sequences drawn a calibration sequence, averaged.
        seed: Of the labels; each sequence has its own generator, so that microbatches change nothing.
        masks: Whether each token or each sequence has a mask of its own.
        on_layer: Called after each layer of each of the two walks, for progress.

    Returns:
        One float32 vector a site, by site name, on the CPU.

    Raises:
        InputError: If a token id is out of range, a gradient is not finite, or the family's units have no output
            projection of their own.
    """
    stack.check_ids(ids)
    if microbatch < 1 or draws < 1:
        raise InputError(f"expected a microbatch and draws of at least 1, got {microbatch} and {draws}; choose e.g. 2")
    projections = output_projections(stack.architecture)
    sequences, positions = as_streams(ids)[-1].shape
    rows = list(microbatches(sequences, microbatch))
    parts = [stack.embed(part_of(ids, each)) for each in rows]
    inputs = []
    with torch.no_grad():
        for layer, weights in stack.layers(range(stack.num_layers)):
            inputs.append(parts)
            parts = walk_forward(stack, parts, layer, weights)
            on_layer(layer)
    upstream = [
        _label_gradients(stack, part, range(each.start, each.stop), seed, draws)
        for part, each in zip(parts, rows, strict=True)
    ]
    del parts
    scale = 1 / (2 * draws * sequences * positions)
    result: dict[str, Tensor] = {}
    for layer, weights in stack.layers(reversed(range(stack.num_layers))):
        squares = _layer_squares(stack, layer, weights, projections[layer], inputs.pop(), upstream, masks)
        for name, values in squares.items():
            if not torch.isfinite(values).all():
                raise InputError(
                    f"{name}: expected finite gradients, got NaN or infinity; the model's weights or activations "
                    "overflow: fetch the model again or change the corpus"
                )
            result[name] = (values * scale).float().cpu()
        on_layer(layer)
    return result


def _layer_squares(
    stack: Stack,
    layer: int,
    weights: dict[str, Tensor],
    projections: list[OutputProjection],
    inputs: list[Streams],
    upstream: list[list[_Gradients]],
    masks: Masks,
) -> dict[str, Tensor]:
    """Return Σ (∂ℓ/∂m_u)² of a layer's units; `upstream` is replaced by the gradients at the layer's inputs."""
    architecture = stack.architecture
    module, fused = architecture.layer_module(layer), architecture.fuse(layer, weights)
    paths = [projection.path_in(architecture) for projection in projections]
    squares = {p.site.name: torch.zeros(p.site.units, dtype=torch.float64) for p in projections}
    with recorded_inputs(module, paths) as seen, torch.enable_grad():
        for index, streams in enumerate(inputs):
            leaves = tuple(stream.detach().requires_grad_() for stream in streams)
            arguments = architecture.layer_arguments(leaves)[layer]
            outputs = architecture.run_layer(layer, leaves, arguments, fused, module)
            entering = [seen[path] for path in paths]
            for draw, gradients in enumerate(upstream[index]):
                reached = [(output, g) for output, g in zip(outputs, gradients, strict=True) if g is not None]
                found = torch.autograd.grad(
                    [output for output, _ in reached],
                    (*entering, *leaves),
                    [g for _, g in reached],
                    retain_graph=draw + 1 < len(upstream[index]),
                    allow_unused=True,
                )
                for projection, x, at_x in zip(projections, entering, found, strict=False):
                    # ∂ℓ/∂m_u of a mask that scales the unit's part of x
                    slopes = (x.detach() * at_x).unflatten(2, (projection.site.units, -1)).sum(dim=3)
                    slopes = slopes.sum(dim=1, keepdim=True) if masks == "sequences" else slopes
                    squares[projection.site.name] += slopes.double().square().sum(dim=(0, 1)).cpu()
                upstream[index][draw] = found[len(entering) :]
            inputs[index] = ()
    return squares


def _label_gradients(stack: Stack, streams: Streams, sequences: range, seed: int, draws: int) -> list[_Gradients]:
    """Return ∂ℓ/∂streams, a draw each, for labels drawn from the model's distribution at every position."""
    leaf = streams[-1].detach().requires_grad_()
    with torch.enable_grad():
        normalised = stack.head_input((*streams[:-1], leaf))
    uniforms = torch.stack([label_uniforms(leaf.shape[1], seed, index, draws) for index in sequences], dim=1)
    gradients = sampled_label_gradients(
        normalised.detach(), stack.head_weight(), uniforms.to(leaf.device), stack.architecture.logit_softcap
    )
    at_hidden = [torch.autograd.grad(normalised, leaf, each, retain_graph=True)[0] for each in gradients]
    return [(*(None,) * (len(streams) - 1), each) for each in at_hidden]


def label_uniforms(positions: int, seed: int, sequence: int, draws: int) -> Float[Tensor, "draws tokens"]:
    """Return the numbers in [0, 1) that draw a sequence's labels: at each position, evenly spaced over the draws.

    Each is uniform by itself; together they draw a likely label about as often as it is likely.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + sequence)
    first = torch.rand(positions, generator=generator, dtype=torch.float64)
    return (first + torch.arange(draws, dtype=torch.float64)[:, None] / draws) % 1
