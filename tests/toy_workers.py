"""Workers for tests of the runners, in a module that other processes can import."""

import os
import signal
import time
from pathlib import Path

from nirvana.errors import InputError


def _folder(job):
    return Path(job.arguments["folder"])


def square(job, device, progress):
    """Return index² as text."""
    progress(0.5)
    if job.arguments.get("wrong") == job.index:
        raise InputError("expected a good candidate, got a bad one; stop")
    if job.arguments.get("broken") == job.index:
        raise LookupError("two\nlines")
    progress(0.5)
    return str(job.index**2).encode()


def killed_once(job, device, progress):
    """Kill the process at job 2, the first time, when half of it is done."""
    mark = _folder(job) / f"tried-{job.index}-{os.getpid()}"
    mark.touch()
    if job.index == 2 and len(list(_folder(job).glob("tried-2-*"))) == 1:
        progress(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return square(job, device, progress)


def killed_always(job, device, progress):
    """Kill the process at job 2, whenever."""
    (_folder(job) / f"tried-{job.index}-{os.getpid()}").touch()
    if job.index == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return square(job, device, progress)


def sleep(job, device, progress):
    """Say which process this is, and take long."""
    (_folder(job) / f"pid-{job.index}").write_text(str(os.getpid()))
    time.sleep(120)
    return b""


def short(job, device, progress):
    """Take half a second."""
    time.sleep(0.5)
    return square(job, device, progress)


def setup(job, device, progress):
    """Return what this process computes with."""
    import torch

    deterministic = torch.are_deterministic_algorithms_enabled()
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    return f"{device} {torch.get_num_threads()} {deterministic} {workspace}".encode()


def gpu(job, device, progress):
    """Return the device that this process was given and the one that `cuda` means in it."""
    import torch

    mark = _folder(job) / f"pid-{os.getpid()}"
    mark.touch()
    deadline = time.monotonic() + 60  # until the other process has a job too
    while len(list(_folder(job).glob("pid-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    return f"{device} {torch.cuda.current_device()}".encode()
