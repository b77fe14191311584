"""Candidates on Dask workers, here or on other machines: paths and numbers out, bytes back.

Workers need the same code, libraries and input files, the latter under the same paths; each says so before its first
job, also one that joins late. They need no cache: this process keeps the values.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace

import torch
from distributed import Client, Future, KilledWorker, wait

from nirvana.errors import InputError
from tasks.workers.dask_cluster import connected
from tasks.workers.dask_worker import Likeness, Place, do_job, likeness, report
from tasks.workers.jobs import Finish, Job, Outcome, Worker
from tasks.workers.runners import slot_devices

_WORKERS_SECONDS = 20
_REPORT_SECONDS = 120
"""A worker's first import of torch and transformers, from a slow shared folder."""
_POLL_SECONDS = 5
_ALONE_SECONDS = 60
"""How long to wait for the next worker when all are gone."""

_LOST = (CancelledError, OSError, TimeoutError)
"""What Dask raises when its scheduler goes away."""

log = logging.getLogger(__name__)


def run_in_dask(
    worker: Worker,
    jobs: Sequence[Job],
    workers: int,
    scheduler: str | None,
    device: torch.device,
    threads: int,
    finish: Finish,
) -> None:
    """Do all jobs on a scheduler's workers, or on `workers` local ones; Dask repeats what a killed worker had.

    Raises:
        InputError: What a worker raised; no scheduler or no worker; a worker that is not like this process; workers
            that are killed again and again at one job.
    """
    jobs = [replace(job, files={name: path.absolute() for name, path in job.files.items()}) for job in jobs]
    ours = likeness({path for job in jobs for path in job.files.values()}, device.type)
    with connected(min(workers, len(jobs)), scheduler) as client:
        where = scheduler or "a local cluster"
        places = _place_workers(client, ours, device, where)
        log.info("Dask: %d candidates on %d workers of %s", len(jobs), len(places), where)
        submitted = [client.submit(do_job, worker, job, ours, places, threads, pure=False) for job in jobs]
        _collect(client, dict(zip(submitted, jobs, strict=True)), where, finish)


def _place_workers(client: Client, ours: Likeness, device: torch.device, where: str) -> Mapping[str, str]:
    """Ask every worker what it is, and give each a device: name -> device."""
    try:
        client.wait_for_workers(1, timeout=_WORKERS_SECONDS)
        addresses = list(client.nthreads())
        asked = {
            address: client.submit(report, ours, workers=[address], pure=False, allow_other_workers=False)
            for address in addresses
        }
        wait(list(asked.values()), timeout=_REPORT_SECONDS)
    except _LOST as error:
        raise InputError(
            f"runtime.scheduler: expected workers at {where}, got none that answers "
            f"({type(error).__name__}); start some (docs/team.md) or set runtime.scheduler to null"
        ) from error
    reports = []
    for address, future in asked.items():
        try:
            reports.append(future.result())
        except Exception as error:  # whatever importing this code raises over there
            raise InputError(
                f"{where}: expected a scheduler and workers that were started in this checkout, got "
                f"{type(error).__name__} ({' '.join(str(error).split())[:80]}) from worker {address}; "
                "start them there with `python -m dask` (docs/team.md)"
            ) from error
        if reports[-1].difference:
            raise InputError(reports[-1].difference)
    return worker_devices(device, reports)


def worker_devices(device: torch.device, places: Sequence[Place]) -> dict[str, str]:
    """Spread each machine's workers over its GPUs: worker name -> device."""
    machines: dict[str, list[Place]] = {}
    for place in sorted(places, key=lambda place: place.worker):
        machines.setdefault(place.host, []).append(place)
    return {
        place.worker: chosen
        for together in machines.values()
        for place, chosen in zip(together, slot_devices(device, len(together), together[0].gpus), strict=True)
    }


def _collect(client: Client, waiting: dict[Future, Job], where: str, finish: Finish) -> None:
    seen = time.monotonic()
    while waiting:
        try:
            done = wait(list(waiting), timeout=_POLL_SECONDS, return_when="FIRST_COMPLETED").done
        except TimeoutError:
            seen = time.monotonic() if _has_workers(client, where) else seen
            if time.monotonic() - seen > _ALONE_SECONDS:
                raise InputError(
                    f"{where}: expected a worker, got none for {_ALONE_SECONDS} s; "
                    "what is finished is kept: start workers and run again"
                ) from None
            continue
        except _LOST as error:
            raise _lost_scheduler(where, error) from error
        seen = time.monotonic()
        for future in done:
            job = waiting.pop(future)
            finish(job, _outcome(future, job, where).unwrap())
            future.release()


def _outcome(future: Future, job: Job, where: str) -> Outcome:
    try:
        return future.result()
    except KilledWorker as error:
        raise InputError(
            f"candidate {job.index}: expected a value, got none: its Dask workers were killed again and again, most "
            "likely for lack of memory; what is finished is kept: lower saliency.microbatch or the number of workers "
            "and run again"
        ) from error
    except _LOST as error:
        raise _lost_scheduler(where, error) from error


def _has_workers(client: Client, where: str) -> bool:
    try:
        return bool(client.nthreads())
    except _LOST as error:
        raise _lost_scheduler(where, error) from error


def _lost_scheduler(where: str, error: BaseException) -> InputError:
    return InputError(
        f"{where}: expected the Dask scheduler to stay, lost it ({type(error).__name__}); "
        "what is finished is kept: run again"
    )
