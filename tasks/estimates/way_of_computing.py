"""What `runtime.execution`, `memory` and `workers` come to for a step that walks the model."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from nirvana.device import most_workers
from nirvana.estimate.steps import Workload, choose, choose_workers
from nirvana.walk import Execution, Memory

if TYPE_CHECKING:
    from tasks.params import Params, Runtime

_LOG = logging.getLogger(__name__)


class Way(NamedTuple):
    """Settled."""

    execution: Execution
    memory: Memory
    workers: int


def chosen_way(
    params: "Params", model: Path, ids: Sequence[Tensor], device: torch.device, candidates: int = 1, **more: Any
) -> Way:
    """Settle `auto` by the estimate for these token ids; the results are the same either way.

    Args:
        params: Reads `runtime`.
        model: The dense model's directory.
        ids: Token ids a stack, `[..., sequences, tokens]`.
        device: What `runtime.device` stands for here.
        candidates: What workers can share; 1: the step is one process.
        more: What else the step is asked to do, as in `nirvana.estimate.steps.Workload`.
    """
    runtime = params.runtime
    work = Workload(
        sequences=ids[0].shape[-2],
        sequence_length=max(part.shape[-1] for part in ids),
        pool_size=candidates,
        **more,
    )
    workers = workers_of(runtime, model, work, device)
    execution, memory = choose(model, replace(work, workers=workers), device, runtime.execution, runtime.memory)
    _LOG.info("weights %s, memory %s%s", execution, memory, f", {workers} workers" if workers > 1 else "")
    return Way(execution, memory, workers)


def workers_of(runtime: "Runtime", model: Path, work: Workload, device: torch.device) -> int:
    """Settle how many processes of this machine share `work.pool_size` candidates.

    Args:
        runtime: Its `workers`; with a scheduler, 1: its workers share no memory of this process's choosing.
        model: The dense model's directory.
        work: What the step is asked to do.
        device: What `runtime.device` stands for here.
    """
    if runtime.scheduler is not None:
        return 1
    if runtime.workers != "auto":
        return min(runtime.workers, work.pool_size)
    most = min(most_workers(device), work.pool_size)
    return choose_workers(model, work, device, runtime.execution, runtime.memory, most)
