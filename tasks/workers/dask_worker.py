"""What runs inside a Dask worker: it says what it is, and does a job only where it is like the step's own process."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
from distributed import get_worker

from tasks.provenance.environment_digest import code_digest, glance, library_versions, machine
from tasks.workers.child import fix_torch, use_device
from tasks.workers.jobs import Job, Outcome, Worker, attempt


@dataclass(frozen=True)
class Likeness:
    """What two processes must have in common for their values to be the same."""

    code: str
    libraries: Mapping[str, str]
    machine: str
    device: str
    """`cpu` or `cuda`."""
    files: Mapping[Path, str]


@dataclass(frozen=True)
class Place:
    """Where a worker is."""

    worker: str
    host: str
    gpus: int
    difference: str | None
    """Why it may not work, in one line."""


def likeness(files: Iterable[Path], device: str) -> Likeness:
    """Describe this process and the files as it sees them."""
    return Likeness(code_digest(), library_versions(), machine(), device, {path: glance(path) for path in files})


def report(expected: Likeness) -> Place:
    """Tell where this worker is, and what is wrong with it."""
    worker = get_worker()
    host = urlsplit(worker.address).hostname or ""
    return Place(str(worker.name), host, torch.cuda.device_count(), _difference(expected))


def do_job(worker: Worker, job: Job, expected: Likeness, devices: Mapping[str, str], threads: int) -> Outcome:
    """Do a job in this worker; `devices` by worker name, for those that were there when the step began."""
    if difference := _difference(expected):
        return Outcome(error="InputError", text=difference)
    device = devices.get(str(get_worker().name), expected.device)
    fix_torch(threads)  # in the thread that computes: threads of a pool have their own count
    use_device(device)
    return attempt(worker, job, device)


def _difference(expected: Likeness) -> str | None:
    worker = get_worker()
    here = f"Dask worker {worker.address}"
    if worker.state.nthreads != 1:
        return f"{here}: expected 1 thread, got {worker.state.nthreads}; start it with --nthreads 1"
    if expected.device == "cuda" and not torch.cuda.is_available():
        return f"{here}: expected a usable GPU as on this machine, found none; set runtime.device to cpu"
    ours = likeness(expected.files, expected.device)
    for path, digest in expected.files.items():
        if ours.files[path] != digest:
            found = "found nothing" if ours.files[path] == "nothing" else "got other content"
            return (
                f"{here}: expected {path} as this machine has it, {found}; keep the checkout in a folder that all "
                "machines share under one path"
            )
    if ours.machine != expected.machine:
        return f"{here}: expected a processor of kind {expected.machine}, got {ours.machine}; use workers of one kind"
    if ours.libraries != expected.libraries:
        name = next(name for name, version in expected.libraries.items() if ours.libraries.get(name) != version)
        return (
            f"{here}: expected {name} {expected.libraries[name]}, got {ours.libraries.get(name)}; "
            "install with constraints.txt on every machine"
        )
    if ours.code != expected.code:
        return f"{here}: expected this checkout's code, got another version; start the worker again from this checkout"
    return None
