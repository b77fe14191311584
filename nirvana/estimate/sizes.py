"""What an estimate is made from: how much the steps are asked to do, and how large the model is."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from nirvana.architectures.architecture import Architecture
from nirvana.architectures.registry import describe
from nirvana.errors import InputError
from nirvana.weights import FLOAT_TYPES, WeightFiles


@dataclass(frozen=True)
class Workload:
    """How much a step is asked to do; lengths in tokens."""

    pool_size: int = 6
    sequences: int = 8
    sequence_length: int = 128
    microbatch: int = 2
    heldout_sequences: int = 8
    heldout_length: int = 128
    needs: str = "weight_gradients"
    """What is computed to score: `nirvana.methods.method.Method.needs`."""
    draws: int = 2
    """Of `fisher`: label sequences a calibration sequence."""
    pruning_ratio: float = 0.2
    compensation_sequences: int = 0
    """0: no compensation."""
    self_generated: int = 0
    """Further sequences to compensate on, which the dense model writes; 0: none. Encoder-decoders write none."""
    compensation_length: int = 128
    recovery_tokens: int = 0
    """0: no fine-tuning."""
    recovery_rank: int = 16
    distillation: float = 0.5
    recovery_curve_every: int = 8192
    """Tokens between two evaluations on the held-out batch."""
    perplexity_tokens: int = 10_240
    window: int = 512
    batch_size: int = 8
    lm_eval: bool = True
    prompt_length: int = 256
    workers: int = 1


@dataclass(frozen=True)
class ModelSizes:
    """What memory and time follow from, in elements."""

    layers: int
    hidden: int
    vocabulary: int
    block_weights: int
    """Of all layers together."""
    largest_layer: int
    largest_layer_tensor: int
    largest_tensor: int
    weights: int
    """Of the whole model."""
    active_weights: int
    """Of the layers, those that one token meets."""
    largest_fused: int
    """Of one layer's experts, which the walk copies into one tensor."""
    neurons: int
    """Widest feed-forward activation of a token."""
    projection_columns: int
    """Columns of the widest matrix that writes to the residual stream: of one expert's, where there are any."""
    kv_width: int
    """Keys and values of a token, of all layers together."""
    adapter_dimensions: int
    """Rows and columns together of all matrices that units own: an adapter has so many weights a rank."""
    streams: int
    stored_bytes: int
    """Bytes an element in the file."""

    @classmethod
    def of(cls, model_directory: Path | str) -> "ModelSizes":
        """Read a model's sizes; weights need not be there.

        Raises:
            InputError: If there is no configuration of a supported family.
        """
        architecture = describe(model_directory)
        counts = {name: math.prod(shape) for name, shape in architecture.parameter_shapes.items()}
        by_layer = [
            sum(counts.get(name, 0) for name in architecture.layer_parameters(layer))
            for layer in range(architecture.num_layers)
        ]
        in_layers = {name for layer in range(architecture.num_layers) for name in architecture.layer_parameters(layer)}
        experts, met = architecture.experts()
        fused = [
            sum(counts[name] for name in architecture.fused_parameters(layer))
            for layer in range(architecture.num_layers)
        ]
        neurons = max(
            sum(site.units for site in architecture.sites() if site.layer == layer and site.module == "mlp")
            for layer in range(architecture.num_layers)
        )
        return cls(
            layers=architecture.num_layers,
            hidden=architecture.hidden_size,
            vocabulary=architecture.vocab_size,
            block_weights=sum(by_layer),
            largest_layer=max(by_layer),
            largest_layer_tensor=max(counts[name] for name in in_layers if name in counts),
            largest_tensor=max(counts.values()),
            weights=sum(counts.values()),
            active_weights=sum(by_layer) - sum(fused) * (experts - met) // experts,
            neurons=neurons * met // experts,
            projection_columns=max(shape[1] for shape in _owned(architecture, 1).values()),
            kv_width=_kv_width(architecture),
            adapter_dimensions=sum(
                shape[0] + shape[1] for shape in {**_owned(architecture, 0), **_owned(architecture, 1)}.values()
            ),
            largest_fused=max(fused),
            streams=2 if architecture.is_encoder_decoder else 1,
            stored_bytes=_stored_bytes(Path(model_directory), getattr(architecture.config, "dtype", None)),
        )


def _owned(architecture: Architecture, dim: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the matrices that units are cut out of along a dimension."""
    shapes = architecture.parameter_shapes
    slots = (slot for site in architecture.sites() for slot in site.weight_slots)
    return {slot.parameter: shapes[slot.parameter] for slot in slots if slot.dim == dim and slot.parameter in shapes}


def _kv_width(architecture: Architecture) -> int:
    # a unit has as many rows of queries as columns of the output projection: what is left are keys and values
    attention = [site for site in architecture.sites() if site.module == "attention"]
    return sum(
        site.units * sum(slot.block if slot.dim == 0 else -slot.block for slot in site.weight_slots)
        for site in attention
    )


def _stored_bytes(directory: Path, dtype: torch.dtype | None) -> int:
    try:
        weights = WeightFiles(directory)
    except InputError:  # only the configuration is there
        return torch.empty((), dtype=dtype or torch.float32).element_size()
    return max(FLOAT_TYPES.get(weights.dtype(name), 4) for name in weights)
