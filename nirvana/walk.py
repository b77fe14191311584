"""Run hidden states through a model layer by layer.

A `Stack` never builds the model: it keeps the code of each layer on the meta device and calls it with weights read by
name, upcast to float32 for compute. Weights can therefore be replaced for one call, sliced or required to have
gradients, without touching anything that another call shares.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call

from nirvana.architectures.decoder import DecoderArchitecture
from nirvana.architectures.registry import architecture_for, read_config
from nirvana.errors import InputError
from nirvana.weights import FLOAT_TYPES, WeightFiles, to_compute

TokenIds = Int[Tensor, "batch tokens"]
Hidden = Float[Tensor, "batch tokens hidden"]
Part = Float[Tensor, "_ tokens hidden"]
"""One microbatch of a list: the last may be smaller."""


@dataclass(frozen=True)
class Stack:
    """A dense model as a stack of layers."""

    architecture: DecoderArchitecture
    weights: WeightFiles
    device: torch.device

    @classmethod
    def open(cls, model_directory: Path | str, device: torch.device | str = "cpu") -> "Stack":
        """Open a model directory.

        Raises:
            InputError: If the family is unknown, the model is quantised, or a file is missing, broken or of another
                model.
        """
        config = read_config(model_directory)
        if getattr(config, "quantization_config", None) is not None:
            raise InputError(
                f"{model_directory}: expected weights in float64, float32, float16 or bfloat16, got a quantised model; "
                "prune the model it was made from, then quantise the result"
            )
        try:
            architecture = architecture_for(config)
            shapes = {name: tuple(weight.shape) for name, weight in architecture.skeleton.named_parameters()}
            architecture.sites()
        except InputError:
            raise
        except Exception as error:  # whatever transformers makes of odd values: no common class
            raise InputError(
                f"{model_directory}/config.json: expected the configuration of a model, got values it cannot be built "
                f"from ({type(error).__name__}: {str(error)[:120]}); fetch the model again"
            ) from error
        stack = cls(architecture, WeightFiles(model_directory), torch.device(device))
        stack._check(shapes)
        return stack

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Find a missing, odd or misshapen parameter now rather than in the middle of a walk."""
        if self.num_layers < 1:
            raise InputError(f"config.json: expected at least one layer, got {self.num_layers}; fetch the model again")
        for name, expected in shapes.items():
            if self.weights.shape(name) != expected:
                raise InputError(
                    f"{name}: expected shape {expected} as config.json says, got {self.weights.shape(name)}; "
                    "the configuration and the weights do not belong together"
                )
        for name in self.weights:
            # a tied head may be stored beside its embedding; old checkpoints store the rotary frequencies
            known = name in shapes or name == self.head_parameter or name.endswith("rotary_emb.inv_freq")
            if not known or self.weights.dtype(name) not in FLOAT_TYPES:
                raise InputError(
                    f"{name}: expected the parameters of a {self.architecture.family.model_type} model in "
                    f"{', '.join(FLOAT_TYPES)}, got this one in {self.weights.dtype(name)}; choose another model"
                )

    @property
    def head_parameter(self) -> str:
        """Name of the output head's weight; where the file has one of its own, transformers does not tie it."""
        own = self.architecture.own_head_parameter
        return own if own in self.weights else self.architecture.embedding_parameter

    @property
    def num_layers(self) -> int:
        """Layers of the stack."""
        return self.architecture.num_layers

    def parameter(self, name: str) -> Tensor:
        """Return one parameter in float32 on the stack's device."""
        return to_compute(self.weights[name], self.device)

    def check_ids(self, ids: TokenIds) -> None:
        """Refuse token ids that the model has no embedding for.

        Raises:
            InputError: If an id is negative or not below the vocabulary size.
        """
        if ids.numel() == 0:
            raise InputError(f"expected sequences of token ids, got none (shape {tuple(ids.shape)}); add some")
        if int(ids.min()) < 0 or int(ids.max()) >= self.architecture.vocab_size:
            raise InputError(
                f"expected token ids below the model's vocabulary size {self.architecture.vocab_size}, got "
                f"{int(ids.min())} to {int(ids.max())}; the tokenizer does not belong to this model"
            )

    def embed(self, ids: TokenIds) -> Hidden:
        """Return the hidden states that enter layer 0."""
        # Gathered before upcasting: a bf16 table of a large vocabulary is never copied whole.
        table = self.weights[self.architecture.embedding_parameter]
        return to_compute(self.architecture.embed(table, ids.to(table.device)), self.device)

    def layer_arguments(self, hidden: Hidden) -> list[dict[str, Any]]:
        """Return each layer's further arguments; they depend on the shape of `hidden` alone."""
        return self.architecture.layer_arguments(hidden)

    def layer_weights(self, layer: int) -> dict[str, Tensor]:
        """Return one layer's parameters in float32, by full name."""
        return {name: self.parameter(name) for name in self.weights.under(self.architecture.layer_prefix(layer))}

    def run_layer(
        self, layer: int, hidden: Hidden, arguments: Mapping[str, Any], weights: Mapping[str, Tensor]
    ) -> Hidden:
        """Return the hidden states that leave a layer, run with the given weights (dense or sliced)."""
        prefix = self.architecture.layer_prefix(layer)
        local = {name.removeprefix(prefix): weight for name, weight in weights.items()}
        output = functional_call(self.architecture.layer_module(layer), local, (hidden,), dict(arguments))
        return output[0] if isinstance(output, tuple) else output

    def final_norm(self, hidden: Hidden) -> Hidden:
        """Return hidden states as the head reads them."""
        prefix = self.architecture.norm_prefix
        local = {name.removeprefix(prefix): self.parameter(name) for name in self.weights.under(prefix)}
        return functional_call(self.architecture.norm_module, local, (hidden,))

    def head_weight(self) -> Tensor:
        """Return the output head as stored: `[vocab, hidden]`. Upcast a chunk at a time."""
        return self.weights[self.head_parameter]


def microbatches(sequences: int, size: int) -> Iterator[slice]:
    """Cut `sequences` rows into slices of at most `size`."""
    return (slice(start, min(start + size, sequences)) for start in range(0, sequences, size))


def walk_forward(stack: Stack, hidden: Sequence[Part], layer: int) -> list[Part]:
    """Return the outputs of one dense layer for every microbatch."""
    weights = stack.layer_weights(layer)
    return [stack.run_layer(layer, part, stack.layer_arguments(part)[layer], weights) for part in hidden]
