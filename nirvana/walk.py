"""Run hidden states through a model layer by layer.

A `Stack` never builds the model: it keeps the code of each layer on the meta device and calls it with weights read by
name, upcast to float32 for compute. Weights can therefore be replaced for one call, sliced or required to have
gradients, without touching anything that another call shares.

Weights are *resident*, in memory once read, or *streamed*: read again in each walk, the next layer while the present
one computes, at most two layers in memory. Both compute the same numbers from the same tensors, bit for bit.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nirvana.architectures.architecture import Architecture, Keep, Parameters, Streams
from nirvana.architectures.registry import describe
from nirvana.directory_kind import refuse_adapter
from nirvana.errors import InputError
from nirvana.layout import check_parameters, has_layer, layout_of
from nirvana.slicing import Slicer
from nirvana.weights import WeightFiles, to_compute

Execution = Literal["resident", "streamed"]
Memory = Literal["lean", "fast"]
"""Whether a backward walk computes each layer a second time or keeps what autograd saved."""
FORWARD_TOKENS = 1024
"""Tokens of a forward through a layer, where no gradient is wanted."""
SEQUENCES_AT_ONCE = 128
"""Sequences that a model writes together, a token a forward; each adds a cache of keys and values."""
TokenIds = Int[Tensor, "batch tokens"]
Ids = TokenIds | tuple[Int[Tensor, "batch _"], ...]
"""Token ids of a decoder-only model; of an encoder-decoder the encoder's and the decoder's."""
Hidden = Float[Tensor, "batch tokens hidden"]


@dataclass(frozen=True)
class Stack:
    """A dense model as a stack of layers."""

    architecture: Architecture
    weights: WeightFiles
    device: torch.device
    execution: Execution = "resident"
    _resident: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(
        cls, model_directory: Path | str, device: torch.device | str = "cpu", execution: Execution = "resident"
    ) -> "Stack":
        """Open a model directory; nothing of the weights is read yet.

        Args:
            model_directory: Configuration and safetensors files.
            device: Where it computes.
            execution: Whether weights stay in memory once they are read.

        Raises:
            InputError: If the family is unknown, the model is quantised, or a file is missing, broken or of another
                model.
        """
        refuse_adapter(_top_names(model_directory), model_directory)
        weights = WeightFiles(model_directory)

        def check_depth(architecture: Architecture) -> None:
            last = max(0, architecture.num_layers - 1)
            if not has_layer(architecture, last, list(weights)):  # before a skeleton of absent layers is built
                raise InputError(
                    f"{architecture.layer_prefix(last)}*: expected parameters of layer {architecture.num_layers}, the "
                    "last that config.json has, found none; the configuration and the weights do not belong together"
                )

        architecture = describe(model_directory, check_depth)
        weights.arrange(layout_of(architecture, weights).stored)
        check_parameters(architecture, weights)
        return cls(architecture, weights, torch.device(device), execution)

    @property
    def head_parameter(self) -> str:
        """Name of the output head's weight; where the file has one of its own, transformers does not tie it."""
        own = self.architecture.own_head_parameter
        return own if own in self.weights else self.architecture.embedding_parameter

    @property
    def num_layers(self) -> int:
        """Layers of the stack."""
        return self.architecture.num_layers

    def is_parameter(self, name: str) -> bool:
        """Tell whether a stored tensor is part of the model; a tied head may be stored beside its embedding."""
        return name in self.architecture.parameter_shapes or name == self.head_parameter

    def stored_name(self, name: str) -> str:
        """Return the tensor to read for a parameter: itself, or in a dense model the one that several layers share."""
        return name if name in self.weights else self.architecture.stored_name(name)

    def parameter(self, name: str) -> Tensor:
        """Return one parameter in float32 on the stack's device."""
        stored = self.stored_name(name)
        if self.execution == "streamed":
            return to_compute(self.weights[stored], self.device)
        if stored not in self._resident:
            self._resident[stored] = to_compute(self.weights[stored], self.device)
        return self._resident[stored]

    def check_ids(self, ids: Ids) -> None:
        """Refuse token ids that the model has no embedding for.

        Raises:
            InputError: If an id is negative or not below the vocabulary size, or the model is an encoder-decoder and
                the ids are not those of an encoder and a decoder.
        """
        expected = 2 if self.architecture.is_encoder_decoder else 1
        each = as_streams(ids)
        if len(each) != expected:
            raise InputError(
                f"expected token ids for {expected} stack(s) of a {self.architecture.model_type} model, "
                f"got {len(each)}; an encoder-decoder needs input_ids and decoder_input_ids, others input_ids only"
            )
        for of_stream in each:
            if of_stream.numel() == 0:
                shape = tuple(of_stream.shape)
                raise InputError(f"expected sequences of token ids, got none (shape {shape}); add some")
            if int(of_stream.min()) < 0 or int(of_stream.max()) >= self.architecture.vocab_size:
                raise InputError(
                    f"expected token ids below the model's vocabulary size {self.architecture.vocab_size}, got "
                    f"{int(of_stream.min())} to {int(of_stream.max())}; the tokenizer does not belong to this model"
                )

    def embed(self, ids: Ids) -> Streams:
        """Return the streams that enter layer 0."""
        # Gathered before upcasting: a bf16 table of a large vocabulary is never copied whole.
        table = self.weights[self.architecture.embedding_parameter]
        vectors = [nn.functional.embedding(each.to(table.device), table) for each in as_streams(ids)]
        return self.architecture.embed([to_compute(vector, self.device) for vector in vectors])

    def layer_weights(self, layer: int) -> dict[str, Tensor]:
        """Return one layer's parameters in float32, by full name, as the checkpoint stores them."""
        return {name: self.parameter(name) for name in self.architecture.layer_parameters(layer)}

    def layers(self, order: Iterable[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield layers with their weights, in the given order.

        When streamed, the next layer is read while the caller works on the present one, whose weights are taken back
        as soon as the caller asks for the next: hold none of them beyond that.
        """
        if self.execution == "resident":
            yield from ((layer, self.layer_weights(layer)) for layer in order)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
            pending: list[tuple[int, Future[dict[str, Tensor]]]] = []
            for following in [*order, None]:
                if following is not None:
                    pending.append((following, pool.submit(self.layer_weights, following)))
                if following is None or len(pending) == 2:
                    layer, future = pending.pop(0)
                    weights = future.result()
                    del future
                    yield layer, weights
                    weights.clear()

    def run_layer(
        self, layer: int, streams: Streams, weights: Parameters, kept_units: Mapping[str, int] | None = None
    ) -> Streams:
        """Return the streams that leave a layer.

        Args:
            layer: Which.
            streams: What enters it.
            weights: Its parameters, dense or sliced, as the module has them (`Architecture.fuse`).
            kept_units: Units by site where the weights are sliced.
        """
        module = self.architecture.layer_module(layer, kept_units)
        arguments = self.architecture.layer_arguments(streams)[layer]
        return self.architecture.run_layer(layer, streams, arguments, weights, module)

    def head_input(self, streams: Streams, updates: Mapping[str, Tensor] | None = None) -> Hidden:
        """Return hidden states as the head reads them; `updates` are parameters in place of the dense ones."""
        architecture, hidden = self.architecture, streams[-1]
        local = {
            name.removeprefix(architecture.norm_prefix): (
                updates[name].to(self.device) if updates and name in updates else self.parameter(name)
            )
            for name in architecture.parameter_shapes
            if name.startswith(architecture.norm_prefix)
        }
        normalised = torch.func.functional_call(architecture.norm_module, local, (hidden,))
        return normalised if architecture.output_scale == 1.0 else normalised * architecture.output_scale

    def head_weight(self) -> Tensor:
        """Return the output head as stored: `[vocab, hidden]`. Upcast a chunk at a time."""
        return self.weights[self.head_parameter]


def _top_names(directory: Path | str) -> list[str]:
    return [file.name for file in Path(directory).iterdir()] if Path(directory).is_dir() else []


def as_streams(ids: Ids) -> tuple[Tensor, ...]:
    """Return token ids as one tensor a stream."""
    return ids if isinstance(ids, tuple) else (ids,)


def part_of(ids: Ids, rows: slice) -> tuple[Tensor, ...]:
    """Return some sequences of each stream's ids."""
    return tuple(each[rows] for each in as_streams(ids))


def microbatches(sequences: int, size: int) -> Iterator[slice]:
    """Cut `sequences` rows into slices of at most `size`."""
    return (slice(start, min(start + size, sequences)) for start in range(0, sequences, size))


def small_batches(stack: Stack, ids: Ids) -> list[Streams]:
    """Return what enters layer 0, in microbatches of about `FORWARD_TOKENS` tokens: small at any length."""
    sequences, length = as_streams(ids)[0].shape
    return [stack.embed(part_of(ids, rows)) for rows in microbatches(sequences, max(1, FORWARD_TOKENS // length))]


@torch.no_grad()
def final_hidden_states(
    stack: Stack,
    ids: Ids,
    keep: Keep | None = None,
    updates: Mapping[str, Tensor] | None = None,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> Hidden:
    """Return what the head reads at every position, of the model as it is or pruned while it is walked.

    Args:
        stack: A dense model, a masked one or a pruned checkpoint.
        ids: Sequences.
        keep: Kept units by site name; each layer is sliced for its own call only. None: the whole model.
        updates: Parameters that are not what slicing leaves, by name: those that compensation solved for, and biases of
            linear layers that have none in the dense model.
        on_layer: Called after each layer, for progress.

    Raises:
        InputError: If a token id is out of range.
    """
    stack.check_ids(ids)
    slicer = None if keep is None else Slicer(stack.architecture.sites(), keep)
    kept_units = None if keep is None else {name: len(indices) for name, indices in keep.items()}
    parts = small_batches(stack, ids)
    for layer, weights in stack.layers(range(stack.num_layers)):
        if slicer is not None:
            # taken out one by one: the dense layer goes as the sliced one comes
            weights = {name: slicer.apply(name, weights.pop(name)) for name in list(weights)}
        if updates is not None:
            prefix = stack.architecture.layer_prefix(layer)
            weights |= {name: value.to(stack.device) for name, value in updates.items() if name.startswith(prefix)}
        parts = walk_forward(stack, parts, layer, weights, kept_units)
        del weights
        on_layer(layer)
    return torch.cat([stack.head_input(part, updates) for part in parts])


def dense_hidden_states(stack: Stack, ids: Ids, on_layer: Callable[[int], None] = lambda layer: None) -> Hidden:
    """Return `final_hidden_states` of a model as it is; the old name, for one release."""
    warnings.warn("dense_hidden_states: use nirvana.final_hidden_states(stack, ids)", DeprecationWarning, stacklevel=2)
    return final_hidden_states(stack, ids, on_layer=on_layer)


def walk_forward(
    stack: Stack,
    parts: Sequence[Streams],
    layer: int,
    weights: Parameters,
    kept_units: Mapping[str, int] | None = None,
) -> list[Streams]:
    """Return the outputs of one layer, dense or with that many units a site, for every microbatch."""
    fused = stack.architecture.fuse(layer, weights)
    return [stack.run_layer(layer, part, fused, kept_units) for part in parts]
