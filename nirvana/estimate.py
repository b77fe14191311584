"""What each step of the method will take: peak memory, disk, time; and which way of computing fits this machine.

Memory is what a process really occupies (`nirvana.anonymous_memory`): weights that are memory-mapped from float32 files
are the kernel's to drop and do not count. The formulas add up what the walk holds at its peak, see docs/concepts.md;
the constants were measured, see docs/benchmarks.md.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nirvana.anonymous_memory import available_bytes
from nirvana.architectures.registry import describe
from nirvana.errors import InputError
from nirvana.walk import FORWARD_TOKENS, Execution, Memory
from nirvana.weights import FLOAT_TYPES, WeightFiles

BASE_BYTES = 300_000_000
"""A process that has imported torch and transformers and opened a model."""
HARNESS_BYTES = 200_000_000
"""What lm-eval and datasets add."""
HARNESS_TOKENS = 64
"""Tokens of a usual lm-eval item, whose logits it holds."""
ARENA_BYTES = 30_000_000
"""What the allocator and the threads of the kernels keep."""
SCORING_ARENA_BYTES = 230_000_000
"""The same, where layers of ever other sizes are cut and freed: measured between 60 and 340 MB."""
FITS = 0.6
"""Share of the available memory that a way of computing may fill to be chosen."""
SLOWEST = 4.0
"""How many times the plain arithmetic a step may take: memory traffic, small operations, a busy machine."""
START_SECONDS = 8.0
"""Imports."""

StepName = Literal["collect_gradients", "score_pool", "prune", "evaluate", "benchmark"]


@dataclass(frozen=True)
class Workload:
    """How much a step is asked to do; lengths in tokens."""

    pool_size: int = 6
    sequences: int = 8
    sequence_length: int = 128
    microbatch: int = 2
    heldout_sequences: int = 8
    heldout_length: int = 128
    pruning_ratio: float = 0.2
    perplexity_tokens: int = 10_240
    window: int = 512
    batch_size: int = 8
    lm_eval: bool = True
    prompt_length: int = 256
    workers: int = 1


@dataclass(frozen=True)
class Sizes:
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
    streams: int
    stored_bytes: int
    """Bytes an element in the file."""

    @classmethod
    def of(cls, model_directory: Path | str) -> "Sizes":
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
            largest_fused=max(fused),
            streams=2 if architecture.is_encoder_decoder else 1,
            stored_bytes=_stored_bytes(Path(model_directory), getattr(architecture.config, "dtype", None)),
        )


def _stored_bytes(directory: Path, dtype: torch.dtype | None) -> int:
    try:
        weights = WeightFiles(directory)
    except InputError:  # only the configuration is there
        return torch.empty((), dtype=dtype or torch.float32).element_size()
    return max(FLOAT_TYPES.get(weights.dtype(name), 4) for name in weights)


@dataclass(frozen=True)
class StepEstimate:
    """What one step takes in one way of computing."""

    step: StepName
    execution: Execution
    memory: Memory
    peak_bytes: int
    """Of all workers of this machine together."""
    disk_bytes: int
    seconds: tuple[float, float]
    """From plain arithmetic at this machine's speed to what overheads and a busy machine make of it."""


def _weights_in_memory(sizes: Sizes, execution: Execution, on_cpu: bool) -> int:
    if sizes.stored_bytes == 4 and on_cpu:
        return 0  # used as they lie in the file's pages
    return 4 * (sizes.block_weights if execution == "resident" else 2 * sizes.largest_layer)


def saliency_bytes(sizes: Sizes, work: Workload, execution: Execution, memory: Memory, on_cpu: bool = True) -> int:
    """Return the peak of one candidate's backward walk in one process."""
    tokens, at_once = work.sequences * work.sequence_length, work.microbatch * work.sequence_length
    saved = 4 * (11 * sizes.hidden + 4 * sizes.neurons)  # what autograd keeps of a token in a layer, measured
    states = 4 * sizes.hidden * sizes.streams * tokens
    kept = (sizes.layers + 2) * states
    graph = saved * (tokens * sizes.layers if memory == "fast" else at_once)
    # one layer's, and what their products and the kernels take besides, measured
    gradients = 4 * (sizes.largest_layer + 3 * sizes.largest_layer_tensor)
    # the fused copy and its gradient; fast keeps the copies of all layers
    fused = 4 * sizes.largest_fused * (1 + (sizes.layers if memory == "fast" else 1))
    return BASE_BYTES + ARENA_BYTES + _weights_in_memory(sizes, execution, on_cpu) + kept + graph + gradients + fused


def divergence_bytes(sizes: Sizes, work: Workload, execution: Execution, on_cpu: bool = True) -> int:
    """Return the peak of scoring one plan in one process."""
    tokens = work.heldout_sequences * work.heldout_length
    at_once = min(tokens, max(FORWARD_TOKENS, work.heldout_length))
    states = 4 * sizes.hidden * (3 * sizes.streams + 1) * tokens
    passing = 4 * (6 * sizes.hidden + 4 * sizes.neurons) * at_once
    copied = execution == "streamed" and not (sizes.stored_bytes == 4 and on_cpu)
    # the sliced layer takes the place of a copied one tensor by tensor, else it stands beside it
    sliced = 4 * sizes.largest_layer_tensor if copied else int(4 * sizes.largest_layer * (1 - work.pruning_ratio))
    fixed = BASE_BYTES + SCORING_ARENA_BYTES + 4 * sizes.largest_fused
    return fixed + _weights_in_memory(sizes, execution, on_cpu) + states + passing + sliced


def perplexity_bytes(sizes: Sizes, work: Workload, execution: Execution, on_cpu: bool = True) -> int:
    """Return the peak of token perplexity by a walk."""
    tokens = math.ceil(work.perplexity_tokens / work.window) * work.window
    at_once = min(tokens, max(FORWARD_TOKENS, work.window))
    states = 4 * sizes.hidden * (2 * sizes.streams + 1) * tokens
    passing = 4 * (6 * sizes.hidden + 4 * sizes.neurons) * at_once
    fixed = BASE_BYTES + ARENA_BYTES + 4 * sizes.largest_fused
    return fixed + _weights_in_memory(sizes, execution, on_cpu) + states + passing


def estimate(
    model_directory: Path | str,
    work: Workload | None = None,
    device: torch.device | str = "cpu",
    operations_per_second: float | None = None,
) -> list[StepEstimate]:
    """Predict every step of a model in every way of computing it.

    Args:
        model_directory: Holds config.json; the weights need not be there yet.
        work: How much is asked for.
        device: Where it computes; memory is the device's.
        operations_per_second: Of float32 matrix products; measured here by default.

    Returns:
        Steps in order, each resident and streamed, saliency also lean and fast.

    Raises:
        InputError: If there is no configuration of a supported family.
    """
    work = work or Workload()
    sizes, on_cpu = Sizes.of(model_directory), torch.device(device).type == "cpu"
    rate = operations_per_second or matmul_rate(torch.device(device))
    pruned_bytes = int(sizes.stored_bytes * (sizes.weights - work.pruning_ratio * sizes.block_weights))
    workers = min(work.workers, work.pool_size)
    calibration, heldout = work.sequences * work.sequence_length, work.heldout_sequences * work.heldout_length
    body, head = 2 * sizes.active_weights, 2 * sizes.hidden * sizes.vocabulary
    kept = 1 - work.pruning_ratio
    result = []

    def add(
        step: StepName,
        execution: Execution,
        memory: Memory,
        peak: int,
        disk: int,
        operations: float,
        read_bytes: float,
    ) -> None:
        shortest = operations / rate + read_bytes / 2e9
        result.append(
            StepEstimate(
                step, execution, memory, peak, disk, (START_SECONDS / 2 + shortest, START_SECONDS + SLOWEST * shortest)
            )
        )

    ways: tuple[tuple[Execution, Memory], ...] = (("resident", "fast"), ("resident", "lean"), ("streamed", "lean"))
    for execution, memory in ways:
        passes = 3 if memory == "fast" else 4
        operations: float = work.pool_size * calibration * (passes * body + head)
        again = 2 * work.pool_size if execution == "streamed" else 1
        peak = workers * saliency_bytes(sizes, work, execution, memory, on_cpu)
        channels = 16 * work.pool_size * sizes.layers * (4 * sizes.hidden + 3 * sizes.neurons)
        add(
            "collect_gradients",
            execution,
            memory,
            peak,
            channels,
            operations,
            again * sizes.stored_bytes * sizes.block_weights,
        )
    for execution in ("resident", "streamed"):
        again = 1 + work.pool_size if execution == "streamed" else 1
        operations = heldout * (body + work.pool_size * (kept * body + 2 * head))
        peak = workers * divergence_bytes(sizes, work, execution, on_cpu)
        read = again * sizes.stored_bytes * sizes.block_weights
        add("score_pool", execution, "lean", peak, 0, operations, read)
    tensor = 2 * sizes.stored_bytes * sizes.largest_layer_tensor  # one is cut while one is written
    add("prune", "streamed", "lean", BASE_BYTES + tensor, pruned_bytes, 0, 2 * sizes.stored_bytes * sizes.weights)
    operations = work.perplexity_tokens * (body + head)
    mapped = sizes.stored_bytes == 4 and on_cpu  # transformers, too, uses float32 files as they lie
    whole = (0 if mapped else 4 * sizes.weights) + 4 * work.batch_size * HARNESS_TOKENS * sizes.vocabulary
    evaluated: tuple[Execution, ...] = ("resident",) if work.lm_eval else ("resident", "streamed")
    for execution in evaluated:
        peak = perplexity_bytes(sizes, work, execution, on_cpu)
        read = sizes.stored_bytes * sizes.weights
        # lm-eval's tasks run on the whole model, after the walk
        peak += HARNESS_BYTES + whole if work.lm_eval else 0
        add("evaluate", execution, "lean", peak, 0, operations * (3 if work.lm_eval else 1), read)
    both = 0 if mapped else 4 * sizes.weights + 4 * (sizes.weights - work.pruning_ratio * sizes.block_weights)
    passing = 4 * work.prompt_length * (6 * sizes.hidden + 4 * sizes.neurons)
    together = int(BASE_BYTES + ARENA_BYTES + both + passing)
    several = 20.0 * work.prompt_length * body
    add("benchmark", "resident", "lean", together, 0, several, 4 * sizes.stored_bytes * sizes.weights)
    return result


def matmul_rate(device: torch.device, size: int = 1024) -> float:
    """Return the operations a second of float32 matrix products: of this process alone, whoever else is busy now."""
    left = torch.ones(size, size, device=device)
    clock, threads = (time.perf_counter, 1) if device.type == "cuda" else (time.process_time, torch.get_num_threads())
    best = math.inf
    for _ in range(6):
        start = clock()
        float((left @ left)[0, 0])
        best = min(best, clock() - start)
    return 2 * size**3 * threads / best


def choose(
    model_directory: Path | str,
    work: Workload,
    device: torch.device,
    execution: Literal["auto", "resident", "streamed"],
    memory: Literal["auto", "fast", "lean"],
) -> tuple[Execution, Memory]:
    """Settle what is left to `auto`: the fastest way that fills at most 60 % of the memory at hand.

    Args:
        model_directory: The model.
        work: How much is asked for; `workers` share the memory.
        device: Where it computes.
        execution: As in params.yaml, `runtime.execution`.
        memory: As in params.yaml, `runtime.memory`.
    """
    sizes, on_cpu = Sizes.of(model_directory), device.type == "cpu"
    free = FITS * device_bytes(device)
    ways: Iterable[tuple[Execution, Memory]] = (("resident", "fast"), ("resident", "lean"), ("streamed", "lean"))
    allowed = [way for way in ways if execution in ("auto", way[0]) and memory in ("auto", way[1])]
    for way in allowed:
        if work.workers * saliency_bytes(sizes, work, *way, on_cpu=on_cpu) <= free:
            return way
    return allowed[-1]


def device_bytes(device: torch.device) -> int:
    """Return the memory that can still be taken on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
