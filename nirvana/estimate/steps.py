"""What each step of the method will take: peak memory, disk, time; and which way of computing fits this machine.

Memory is what a process really occupies (`nirvana.device`): weights that are memory-mapped from float32 files
are the kernel's to drop and do not count. The formulas are in `nirvana.estimate.memory`; see docs/concepts.md.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from nirvana.device import available_bytes, devices
from nirvana.estimate.memory import (
    BASE_BYTES,
    compensation_bytes,
    divergence_bytes,
    evaluation_bytes,
    fisher_bytes,
    fitted_sequences,
    generation_bytes,
    perplexity_bytes,
    recovery_bytes,
    saliency_bytes,
    self_generation_bytes,
)
from nirvana.estimate.sizes import ModelSizes, Workload
from nirvana.walk import SEQUENCES_AT_ONCE, Execution, Memory

__all__ = [
    "FITS",
    "ModelSizes",
    "StepEstimate",
    "Workload",
    "choose",
    "choose_workers",
    "estimate",
    "matmul_rate",
]

FITS = 0.6
"""Share of the available memory that a way of computing may fill to be chosen."""
SLOWEST = 4.0
"""How many times the plain arithmetic a step may take: memory traffic, small operations, a busy machine."""
START_SECONDS = 8.0
"""Imports."""
WORTH_A_WORKER = 5e11
"""Operations of all candidates' forwards: with fewer, one process is done before another has started."""

READ_BYTES_PER_SECOND = 2e9
"""Of files that are still in memory, as after a download or a first pass."""

StepName = Literal[
    "generate_text", "collect_gradients", "score_pool", "compensate", "prune", "recover", "evaluate", "benchmark"
]
"""As in the flow; `compensate` is the first part of the step prune."""

_EXECUTIONS: tuple[Execution, ...] = ("resident", "streamed")
_WAYS: tuple[tuple[Execution, Memory], ...] = (("resident", "fast"), ("resident", "lean"), ("streamed", "lean"))
"""Of saliency, the fastest first."""


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
    sizes, on_cpu = ModelSizes.of(model_directory), torch.device(device).type == "cpu"
    steps = _Steps(sizes, work, on_cpu, operations_per_second or matmul_rate(torch.device(device)))
    result = [steps.self_generation()] if work.self_generated and sizes.streams == 1 else []
    result += [*steps.saliency(), *steps.divergence()]
    if work.compensation_sequences:
        result += steps.compensation()
    result.append(steps.surgery())
    if work.recovery_tokens:
        result.append(steps.recovery())
    return [*result, *steps.evaluation(), steps.benchmark()]


class _Steps:
    """Every step's estimates; operations are those of matrix products, two a multiply-add."""

    def __init__(self, sizes: ModelSizes, work: Workload, on_cpu: bool, rate: float):
        self.sizes, self.work, self.on_cpu, self.rate = sizes, work, on_cpu, rate
        self.kept = 1 - work.pruning_ratio
        self.workers = min(work.workers, work.pool_size)
        # of a token: through the layers, through the head
        self.body, self.head = 2 * sizes.active_weights, 2 * sizes.hidden * sizes.vocabulary
        self.layer_bytes, self.model_bytes = (
            sizes.stored_bytes * each for each in (sizes.block_weights, sizes.weights)
        )
        self.pruned_bytes = int(sizes.stored_bytes * (sizes.weights - work.pruning_ratio * sizes.block_weights))

    def self_generation(self) -> StepEstimate:
        sizes, count, length = self.sizes, self.work.self_generated, self.work.compensation_length
        # each token of a batch reads all weights anew; a GPU does so in next to no time
        read = 4 * sizes.weights * length * math.ceil(count / SEQUENCES_AT_ONCE) if self.on_cpu else self.model_bytes
        peak = self_generation_bytes(sizes, self.work, self.on_cpu)
        return self._step("generate_text", "resident", peak, count * length * (self.body + self.head), read)

    def saliency(self) -> Iterator[StepEstimate]:
        work, sizes = self.work, self.sizes
        tokens = work.pool_size * work.sequences * work.sequence_length
        if work.needs != "weight_gradients":
            # the most that any other needs, mask Fisher:
            # forward, forward again, and back to each layer's input alone; for all draws logits twice, the head's rows
            operations = tokens * ((2 + work.draws) * self.body + 3 * self.head)
            disk = 8 * work.pool_size * sizes.layers * sizes.neurons
            for execution in _EXECUTIONS:
                peak = self.workers * fisher_bytes(sizes, work, execution, self.on_cpu)
                read = (2 * work.pool_size if execution == "streamed" else 1) * self.layer_bytes
                yield self._step("collect_gradients", execution, peak, operations, read, disk)
            return
        channels = 16 * work.pool_size * sizes.layers * (4 * sizes.hidden + 3 * sizes.neurons)
        for execution, memory in _WAYS:
            operations = tokens * ((3 if memory == "fast" else 4) * self.body + self.head)
            peak = self.workers * saliency_bytes(sizes, work, execution, memory, self.on_cpu)
            read = (2 * work.pool_size if execution == "streamed" else 1) * self.layer_bytes
            yield self._step("collect_gradients", execution, peak, operations, read, channels, memory)

    def divergence(self) -> Iterator[StepEstimate]:
        tokens = self.work.heldout_sequences * self.work.heldout_length
        operations = tokens * (self.body + self.work.pool_size * (self.kept * self.body + 2 * self.head))
        for execution in _EXECUTIONS:
            peak = self.workers * divergence_bytes(self.sizes, self.work, execution, self.on_cpu)
            read = (1 + self.work.pool_size if execution == "streamed" else 1) * self.layer_bytes
            yield self._step("score_pool", execution, peak, operations, read)

    def compensation(self) -> Iterator[StepEstimate]:
        sizes = self.sizes
        tokens = fitted_sequences(sizes, self.work) * self.work.compensation_length
        # the dense layer; the pruned one up to either projection, then what they write
        walked = tokens * self.body * (1 + 7 / 3 * self.kept)
        hidden, columns = sizes.hidden, self.kept * sizes.projection_columns
        gathered = sum(2 * tokens * (width**2 + 3 * width * hidden) for width in (hidden, columns))
        solved = 2 * (2 / 3 * columns**3 + 2 * columns**2 * hidden)  # float64 takes twice as long
        operations = walked + sizes.layers * (gathered + solved)
        for execution in _EXECUTIONS:
            peak = compensation_bytes(sizes, self.work, execution, self.on_cpu)
            yield self._step("compensate", execution, peak, operations, self.layer_bytes)

    def surgery(self) -> StepEstimate:
        tensor = 2 * self.sizes.stored_bytes * self.sizes.largest_layer_tensor  # one is cut while one is written
        return self._step("prune", "streamed", BASE_BYTES + tensor, 0, 2 * self.model_bytes, self.pruned_bytes)

    def recovery(self) -> StepEstimate:
        work = self.work
        teaches = work.distillation > 0
        forward = self.kept * self.body + self.head
        dense = self.body + self.head if teaches else 0
        points = 1 + math.ceil(work.recovery_tokens / work.recovery_curve_every)
        heldout = work.heldout_sequences * work.heldout_length
        # back to what enters each adapter; adapters themselves are small
        operations = work.recovery_tokens * (2 * forward + dense) + heldout * (points * (forward + dense) + dense)
        peak = recovery_bytes(self.sizes, work, self.on_cpu)
        return self._step("recover", "resident", peak, operations, 2 * self.model_bytes, self.pruned_bytes)

    def evaluation(self) -> Iterator[StepEstimate]:
        # lm-eval's tasks run on the whole model, after the walk
        lm_eval = self.work.lm_eval
        operations = self.work.perplexity_tokens * (self.body + self.head) * (3 if lm_eval else 1)
        for execution in _EXECUTIONS[:1] if lm_eval else _EXECUTIONS:
            peak = perplexity_bytes(self.sizes, self.work, execution, self.on_cpu)
            peak += evaluation_bytes(self.sizes, self.work, self.on_cpu) if lm_eval else 0
            yield self._step("evaluate", execution, peak, operations, self.model_bytes)

    def benchmark(self) -> StepEstimate:
        peak = generation_bytes(self.sizes, self.work, self.on_cpu)
        return self._step("benchmark", "resident", peak, 20 * self.work.prompt_length * self.body, 4 * self.model_bytes)

    def _step(
        self,
        step: StepName,
        execution: Execution,
        peak: int,
        operations: float,
        read_bytes: float,
        disk: int = 0,
        memory: Memory = "lean",
    ) -> StepEstimate:
        shortest = operations / self.rate + read_bytes / READ_BYTES_PER_SECOND
        seconds = (START_SECONDS / 2 + shortest, START_SECONDS + SLOWEST * shortest)
        return StepEstimate(step, execution, memory, peak, disk, seconds)


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
    sizes, on_cpu = ModelSizes.of(model_directory), device.type == "cpu"
    free, side_by_side = FITS * available_bytes(device), math.ceil(work.workers / devices(device))
    allowed = [way for way in _WAYS if execution in ("auto", way[0]) and memory in ("auto", way[1])]
    return next((way for way in allowed if side_by_side * _peak(sizes, work, way, on_cpu) <= free), allowed[-1])


def choose_workers(
    model_directory: Path | str,
    work: Workload,
    device: torch.device,
    execution: Literal["auto", "resident", "streamed"],
    memory: Literal["auto", "fast", "lean"],
    most: int,
) -> int:
    """Return how many workers should share the candidates, each computing in the way that one alone would choose.

    What is not said here of the arguments is as in `choose`.

    Args:
        work: How much is asked for; its `workers` do not count. Too little is for one.
        most: No more than these, even where more would fit; at least 1.
    """
    sizes, alone = ModelSizes.of(model_directory), replace(work, workers=1)
    if 2 * sizes.weights * work.pool_size * work.sequences * work.sequence_length < WORTH_A_WORKER:
        return 1
    peak = _peak(sizes, alone, choose(model_directory, alone, device, execution, memory), device.type == "cpu")
    return max(1, min(most, devices(device) * int(FITS * available_bytes(device) / peak)))


def _peak(sizes: ModelSizes, work: Workload, way: tuple[Execution, Memory], on_cpu: bool) -> int:
    """Return what one process takes at most, of the steps whose way is chosen."""
    if work.needs != "weight_gradients":  # the others have one way of memory, Fisher's is the largest
        peak = fisher_bytes(sizes, work, way[0], on_cpu)
    else:
        peak = saliency_bytes(sizes, work, *way, on_cpu=on_cpu)
    if work.compensation_sequences:
        peak = max(peak, compensation_bytes(sizes, work, way[0], on_cpu))
    return peak
