"""Who computes the candidates: this process, processes beside it, or Dask workers. The values do not depend on it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from nirvana.device import devices
from tasks.workers.jobs import Finish, Job, Progress, Worker

if TYPE_CHECKING:
    from tasks.params import Runtime


def run(
    worker: Worker,
    jobs: Sequence[Job],
    runtime: "Runtime",
    workers: int,
    device: torch.device,
    finish: Finish,
    progress: Progress,
) -> None:
    """Compute every job's value and pass it to `finish`.

    Args:
        worker: A function of a module: other processes import it by name.
        runtime: Says who computes.
        workers: What `runtime.workers` stands for here.
        device: What `runtime.device` stands for here.
        finish: Called in this process, in the order in which values arrive.
        progress: Called with shares of jobs as they are done; Dask's workers tell whole jobs only.

    Raises:
        InputError: What a worker raised, that a worker was killed twice at one job, or that Dask workers cannot be
            reached or are not like this process.
    """
    threads = torch.get_num_threads()
    if runtime.runner == "dask":
        from tasks.workers.dask_pool import run_in_dask  # takes a second to import

        def finish_whole(job: Job, value: bytes) -> None:
            finish(job, value)
            progress(1)

        run_in_dask(worker, jobs, workers, runtime.scheduler, device, threads, finish_whole)
    elif workers == 1 or len(jobs) == 1:
        for job in jobs:
            finish(job, worker(job, str(device), progress))
    else:
        from tasks.workers.process_pool import run_in_processes

        slots = slot_devices(device, workers, devices(device))
        run_in_processes(worker, jobs, slots, threads, finish, progress)


def slot_devices(device: torch.device, slots: int, gpus: int) -> list[str]:
    """Spread the slots of one machine over its GPUs: slot i computes on GPU i modulo their count.

    Args:
        device: Resolved device; one that names its GPU, or a CPU, serves all slots.
        slots: Workers of the machine.
        gpus: GPUs that they see.
    """
    if device.type != "cuda" or device.index is not None or gpus < 2:
        return [str(device)] * slots
    return [f"cuda:{slot % gpus}" for slot in range(slots)]
