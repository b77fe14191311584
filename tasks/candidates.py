"""Fan-out over calibration candidates, and what lets a killed step resume.

Each candidate's value goes to `.cache/candidates/<key>` as soon as it is computed. The key digests everything that the
value depends on, code and library versions included, and a value is validated before it is used again: the cache can
be deleted at any time and never decides what is right. DVC remains the only memory between steps.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nirvana.errors import InputError
from tasks.child import die_with_parent, fix_torch

CACHE = Path(".cache/candidates")
_LIBRARIES = ("torch", "transformers", "numpy", "safetensors")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One candidate's work, small enough to be sent to another process: paths and numbers, never tensors."""

    index: int
    result: Path
    """Where the worker leaves the value; appears whole or not at all."""
    arguments: Mapping[str, Any]


Progress = Callable[[float], None]
Worker = Callable[[Job, Progress], None]


def candidate_key(kind: str, **depends_on: Any) -> str:
    """Digest what a candidate's value depends on; code and library versions are added here."""
    from importlib.metadata import version

    stated = {
        "kind": kind,
        "code": _code_digest(),
        "libraries": {name: version(name) for name in _LIBRARIES},
        "machine": platform.machine(),
        **depends_on,
    }
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()


def _code_digest() -> str:
    import nirvana

    digest = hashlib.sha256()
    for root in (Path(nirvana.__file__).parent, Path(__file__).parent):
        for file in sorted(root.rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def run_jobs(
    worker: Worker, jobs: Sequence[Job], is_valid: Callable[[Job], bool], workers: int, description: str
) -> None:
    """Make every job's result exist: reuse what is valid, compute the rest, here or in `workers` processes.

    Raises:
        InputError: What a worker raised, or that a worker was killed (finished candidates stay cached).
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
        if workers == 1 or len(todo) <= 1:
            for job in todo:
                worker(job, bar.update)
        else:
            _run_in_processes(worker, todo, workers, bar)


def _run_in_processes(worker: Worker, todo: Sequence[Job], workers: int, bar: Any) -> None:
    import torch

    # spawn: forking a process whose torch has threads deadlocks
    context = multiprocessing.get_context("spawn")
    setup = (os.getpid(), torch.get_num_threads())
    with ProcessPoolExecutor(min(workers, len(todo)), context, _start_worker, setup) as pool:
        futures = [pool.submit(worker, job, _no_progress) for job in todo]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update(1)
        except BrokenProcessPool as error:
            raise InputError(
                "a worker process was killed, most likely for memory; what it had finished is kept: "
                "lower runtime.workers or saliency.microbatch and run again"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _no_progress(share: float) -> None:
    """Workers in other processes report a candidate when it is done."""


def _start_worker(parent: int, threads: int) -> None:
    die_with_parent(parent)
    fix_torch(threads)


def forget(jobs: Sequence[Job]) -> None:
    """Delete cached values once the step's own outputs hold them."""
    for job in jobs:
        job.result.unlink(missing_ok=True)
