"""Fan-out over calibration candidates, and what lets a killed step resume.

Each candidate's value goes to `.cache/candidates/<key>` as soon as it is computed. The key digests everything that the
value depends on, code and library versions included, and a value is validated before it is used again: the cache can
be deleted at any time and never decides what is right. DVC remains the only memory between steps.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from nirvana.files import atomic_file
from tasks import runners
from tasks.environment_digest import code_digest, library_versions, machine
from tasks.jobs import Job, Worker

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
    is_valid: Callable[[Job], bool],
    runtime: "Runtime",
    workers: int,
    device: torch.device,
    description: str,
) -> None:
    """Make every job's result exist: reuse what is valid, compute the rest.

    Args:
        worker: A function of a module: other processes import it by name.
        jobs: One a candidate.
        is_valid: Whether a job's result is whole.
        runtime: Who computes.
        workers: What `runtime.workers` stands for here.
        device: What `runtime.device` stands for here.
        description: What the progress bar says.

    Raises:
        InputError: What a worker raised, or that workers were killed (finished candidates stay cached).
    """
    todo = [job for job in jobs if not is_valid(job)]
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
    with atomic_file(job.result) as temporary:
        temporary.write_bytes(value)


def forget(jobs: Sequence[Job]) -> None:
    """Delete cached values once the step's own outputs hold them."""
    for job in jobs:
        job.result.unlink(missing_ok=True)
