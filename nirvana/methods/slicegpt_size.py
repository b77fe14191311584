"""What a model sliced by SliceGPT stores, which dimension meets a ratio, and which models can be sliced at all."""

import math
from dataclasses import dataclass

from nirvana.architectures.architecture import Architecture
from nirvana.architectures.site import Module
from nirvana.errors import InputError

BRANCHES: tuple[tuple[Module, str, str], ...] = (
    ("attention", "self_attn", "input_layernorm"),
    ("mlp", "mlp", "post_attention_layernorm"),
)
"""Of a layer with plain residuals, in order: the branch and the norm before it."""
Matrices = dict[tuple[int, Module], tuple[set[str], set[str]]]
"""By layer and branch: the matrices that read the residual stream, and those that write to it."""


@dataclass(frozen=True)
class SlicedSize:
    """What a sliced model stores; see `nirvana.methods.slicegpt` on size."""

    dimension: int
    hidden: int
    block_weights: int
    """Matrices of the layers as sliced, without the shortcuts."""
    shortcut_weights: int
    dense_block_weights: int
    parameters: int
    """All of them: also the embeddings, the head of its own, biases."""

    @property
    def achieved_ratio(self) -> float:
        """Share of the dense block weights that leaves, shortcuts counted; below 0 where they outweigh it."""
        return 1 - (self.block_weights + self.shortcut_weights) / self.dense_block_weights

    @property
    def slicing_fraction(self) -> float:
        """Share of the hidden size that leaves: what the paper's percentages are."""
        return 1 - self.dimension / self.hidden

    @property
    def statement(self) -> str:
        """One line on what is counted."""
        return (
            f"{self.dimension} of {self.hidden} dimensions; block weights with {self.shortcut_weights:,} of shortcut "
            f"matrices {100 * self.achieved_ratio:.2f} % below dense; {self.parameters:,} parameters with sliced "
            "embeddings and an untied head"
        )


def sliced_size(architecture: Architecture, dimension: int) -> SlicedSize:
    """Count what is left of a model when the residual stream keeps `dimension` coordinates.

    Raises:
        InputError: If the model is of a kind that cannot be sliced, or it has no such dimension.
    """
    check_can_be_sliced(architecture)
    hidden, shapes = architecture.hidden_size, architecture.parameter_shapes
    if not 1 <= dimension <= hidden:
        raise InputError(f"SliceGPT: expected a dimension of 1 to {hidden}, got {dimension}; choose one of those")
    matrices = stream_matrices(architecture)
    blocks = shortcuts = others = 0
    for layer in range(architecture.num_layers):
        for module, branch, _ in BRANCHES:
            leaving = hidden if module == "mlp" and layer == architecture.num_layers - 1 else dimension
            readers, writers = matrices[layer, module]
            shortcuts += dimension * leaving
            for name in architecture.layer_parameters(layer):
                if not name.startswith(f"{architecture.layer_prefix(layer)}{branch}."):
                    continue  # the other branch, or a norm, whose gain is part of the matrices
                count = math.prod(shapes[name])
                if name in readers:
                    blocks += count // hidden * dimension
                elif name in writers:
                    blocks += count // hidden * leaving
                else:  # a writer's bias has what the stream has, a reader's or an inner norm stays whole
                    others += leaving if weight_of(name) in writers else count
    dense = sum(site.weights for site in architecture.sites())
    rows = shapes[architecture.embedding_parameter][0]
    tables = rows * dimension + architecture.vocab_size * hidden
    return SlicedSize(dimension, hidden, blocks, shortcuts, dense, blocks + shortcuts + others + tables)


def dimension_for(architecture: Architecture, pruning_ratio: float) -> int:
    """Return the dimension whose block weights, shortcuts counted, come nearest to the ratio; one is kept at least.

    Raises:
        InputError: If the ratio is not in [0, 1), or the model cannot be sliced.
    """
    if not 0 <= pruning_ratio < 1:
        raise InputError(f"pruning_ratio: expected 0 <= ratio < 1, got {pruning_ratio}; choose e.g. 0.2")
    low, high = 1, architecture.hidden_size
    while low < high:  # the least dimension that keeps as much as asked for: what is kept grows with it
        middle = (low + high) // 2
        enough = sliced_size(architecture, middle).achieved_ratio <= pruning_ratio
        low, high = (low, middle) if enough else (middle + 1, high)
    below = max(1, low - 1)
    return min(below, low, key=lambda each: abs(sliced_size(architecture, each).achieved_ratio - pruning_ratio))


def check_can_be_sliced(architecture: Architecture) -> None:
    """Refuse what is not a stack of norm, matrices and sum.

    Raises:
        InputError: If the model is an encoder-decoder, a norm stands between a branch and the stream, or matrices read
            the stream that are no units', such as those which choose experts.
    """
    if architecture.is_encoder_decoder:
        raise _refused(architecture, "an encoder-decoder")
    matrices, shapes = stream_matrices(architecture), architecture.parameter_shapes
    expected = {name for _, branch, norm in BRANCHES for name in (branch, norm)}
    for layer in range(architecture.num_layers):
        names = architecture.layer_parameters(layer)
        parts = {name.removeprefix(architecture.layer_prefix(layer)).split(".")[0] for name in names}
        if architecture.residual_scale is None or parts != expected:
            raise _refused(architecture, f"layer {layer} of {', '.join(sorted(parts))}")
        known = {name for module, *_ in BRANCHES for kind in matrices[layer, module] for name in kind}
        others = {name for name in names if len(shapes[name]) > 1} - known
        if others:
            raise _refused(architecture, f"{min(others)} beside its matrices")


def _refused(architecture: Architecture, found: str) -> InputError:
    return InputError(
        "SliceGPT: expected a decoder-only model of attention and MLP, each with a norm before it and no other, got "
        f"{found} ({architecture.model_type}); choose another method"
    )


def stream_matrices(architecture: Architecture) -> Matrices:
    """Return what touches the residual stream."""
    found: Matrices = {}
    for site in architecture.sites():
        readers_and_writers = found.setdefault((site.layer, site.module), (set(), set()))
        for slot in site.weight_slots:
            readers_and_writers[slot.dim].add(slot.parameter)
    return found


def weight_of(bias: str) -> str:
    """Return the name of the matrix that a bias belongs to."""
    return f"{bias.removesuffix('.bias')}.weight"
