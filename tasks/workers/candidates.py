"""Fan-out over calibration candidates, and what lets a killed step resume.

Each candidate's value goes to `.cache/candidates/<key>` as soon as it is computed. The key digests everything that the
value depends on, code and library versions included. A digest beside the value tells one that was changed or cut since,
and it is validated before it is used again: the cache can be deleted at any time and never decides what is right. DVC
remains the only memory between steps.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from nirvana.errors import InputError
from nirvana.files import read_sealed, write_sealed
from tasks.provenance.environment_digest import code_digest, library_versions, machine
from tasks.workers import runners
from tasks.workers.jobs import Job, Worker

if TYPE_CHECKING:
    from tasks.params import Runtime

CACHE = Path(".cache/candidates")

log = logging.getLogger(__name__)


def candidate_key(kind: str, **depends_on: Any) -> str:
    """Digest what a candidate's value depends on; code and library versions are added here."""
    stated = {
        "kind": kind,
        "code": code_digest(),
        "libraries": library_versions(),
        "machine": machine(),
        **depends_on,
    }
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()


def run_jobs(
    worker: Worker,
    jobs: Sequence[Job],
    is_valid: Callable[[bytes], bool],
    runtime: "Runtime",
    workers: int,
    device: torch.device,
    description: str,
) -> None:
    """Make every job's result exist: reuse what is valid, compute the rest.

    Args:
        worker: A function of a module: other processes import it by name.
        jobs: One a candidate.
        is_valid: Whether bytes are a value of these jobs.
        runtime: Who computes.
        workers: What `runtime.workers` stands for here.
        device: What `runtime.device` stands for here.
        description: What the progress bar says.

    Raises:
        InputError: What a worker raised, or that workers were killed (finished candidates stay cached).
    """
    found = [_kept(job) for job in jobs]
    todo = [job for job, value in zip(jobs, found, strict=True) if value is None or not is_valid(value)]
    if len(todo) < len(jobs):
        log.info("%s: resuming, %d of %d candidates are already done", description, len(jobs) - len(todo), len(jobs))
    with tqdm(
        total=len(jobs),
        initial=len(jobs) - len(todo),
        desc=description,
        unit="candidate",
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} candidates [{elapsed}<{remaining}]",
    ) as bar:
        if todo:
            runners.run(worker, todo, runtime, workers, device, _store, bar.update)


def _store(job: Job, value: bytes) -> None:
    write_sealed(job.result, value)


def _kept(job: Job) -> bytes | None:
    value = read_sealed(job.result)
    if value is None and job.result.exists():
        log.warning("%s is damaged; candidate %d is computed again", job.result, job.index)
    return value


def value_of(job: Job) -> bytes:
    """Return the value of a job that `run_jobs` has done.

    Raises:
        InputError: If it was changed since.
    """
    value = read_sealed(job.result)
    if value is None:
        raise InputError(
            f"{job.result}: expected the value of candidate {job.index}, got a damaged file; run the same command again"
        )
    return value


def forget(jobs: Sequence[Job]) -> None:
    """Delete cached values once the step's own outputs hold them."""
    for job in jobs:
        job.result.unlink(missing_ok=True)
