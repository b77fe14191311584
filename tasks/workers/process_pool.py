"""Candidates in processes of this machine: one process a slot, each slot with a device of its own.

Not concurrent.futures: there a killed worker takes all others and their half-done work along, and a process does not
know its slot.
"""

import logging
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait

from nirvana.errors import InputError
from tasks.workers.child import die_with_parent, fix_torch, use_device
from tasks.workers.jobs import Finish, Job, Outcome, Progress, Worker, attempt, no_progress

_ATTEMPTS = 2
"""A process may be killed for another's sake, so its job is tried once more; twice is the job's own doing."""

log = logging.getLogger(__name__)


def run_in_processes(
    worker: Worker,
    jobs: Sequence[Job],
    devices: Sequence[str],
    threads: int,
    finish: Finish,
    progress: Progress = no_progress,
) -> None:
    """Do all jobs, at most `len(devices)` at a time; a killed process is replaced and its job done again.

    Raises:
        InputError: What a worker raised, or that two processes were killed at one job.
    """
    waiting, lost = deque(jobs), Counter[int]()
    slots: list[_Slot] = []
    try:
        for device in devices[: len(jobs)]:
            slots.append(_Slot(worker, device, threads))
            slots[-1].give(waiting.popleft())
        while slots:
            ready = wait([slot.connection for slot in slots])
            for slot in [slot for slot in slots if slot.connection in ready]:
                try:
                    told: Outcome | float = slot.connection.recv()
                except (EOFError, OSError):
                    lost[slot.job.index] += 1
                    _explain_loss(slot, lost[slot.job.index])
                    progress(-slot.done)
                    slot.start()
                    slot.give(slot.job)
                    continue
                if not isinstance(told, Outcome):
                    slot.done += told
                    progress(told)
                    continue
                finish(slot.job, told.unwrap())
                progress(1 - slot.done)
                if waiting:
                    slot.give(waiting.popleft())
                else:
                    slots.remove(slot)
                    slot.stop()
    finally:
        for slot in slots:
            slot.stop()


class _Slot:
    """A place for one process at a time."""

    job: Job
    done: float
    """Share of the job that the process has told of."""
    connection: Connection

    def __init__(self, worker: Worker, device: str, threads: int):
        self._setup = (worker, device, threads)
        self.start()

    def start(self) -> None:
        # spawn: forking a process whose torch has threads deadlocks
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, os.getpid(), *self._setup), daemon=True)
        self.process.start()
        theirs.close()  # now only the process holds it: its death ends the connection

    def give(self, job: Job) -> None:
        self.job, self.done = job, 0
        with suppress(OSError):  # it was killed while idle: the next `recv` says so
            self.connection.send(job)

    def stop(self) -> None:
        """End the process; what it had to give is here already, or unwanted."""
        self.connection.close()
        self.process.kill()
        self.process.join()


def _explain_loss(slot: _Slot, times: int) -> None:
    slot.process.join()
    code = slot.process.exitcode or 0
    how = f"was killed (signal {-code})" if code < 0 else f"ended by itself (exit status {code})"
    if times >= _ATTEMPTS:
        raise InputError(
            f"candidate {slot.job.index}: expected a value, got none: its worker {how}, {times} times, most likely for "
            "lack of memory; what is finished is kept: set fewer runtime.workers or lower saliency.microbatch"
        )
    log.warning("candidate %d: its worker %s; trying once more", slot.job.index, how)


def _serve(connection: Connection, parent: int, worker: Worker, device: str, threads: int) -> None:
    """Do jobs until the step hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the step, which ends its workers
    die_with_parent(parent)
    fix_torch(threads)
    use_device(device)
    with suppress(EOFError, OSError):
        while True:
            connection.send(attempt(worker, connection.recv(), device, connection.send))
