"""One candidate's work, and what became of it: all that travels between a step and its workers.

Paths, numbers and texts go out, bytes come back. An error travels as text: what cannot be rebuilt in another process
cannot get lost there.
"""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nirvana.errors import InputError


@dataclass(frozen=True)
class Job:
    """One candidate's work, small enough to be sent anywhere: paths and numbers, never tensors."""

    index: int
    result: Path
    """Where the step keeps the value; workers do not write it."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """What the worker reads, by name."""
    arguments: Mapping[str, Any] = field(default_factory=dict)


Progress = Callable[[float], None]
"""Told the share of the job that was just done; a negative one where it was lost with its process."""
Worker = Callable[[Job, str, Progress], bytes]
"""Computes a job's value on a device (`cpu`, `cuda`, `cuda:1`) and returns the bytes that `Job.result` shall hold."""
Finish = Callable[[Job, bytes], None]
"""Told each value as it arrives, in the step's own process."""


def no_progress(share: float) -> None:
    """Tell nobody: the job counts when it is done."""


class WorkerError(RuntimeError):
    """A worker failed unexpectedly; the notes hold its traceback."""


@dataclass(frozen=True)
class Outcome:
    """What a worker has to say: a value, or an error's class, text and traceback."""

    value: bytes = b""
    error: str | None = None
    text: str = ""
    trace: str = ""

    def unwrap(self) -> bytes:
        """Return the value, or raise the error as if it had happened here."""
        if self.error is None:
            return self.value
        if self.error == "InputError":
            raise InputError(self.text)
        if self.error == "MemoryError":
            raise MemoryError(self.text)
        error = WorkerError(self.text)
        error.add_note(f"in a worker:\n{self.trace}")
        raise error


def attempt(worker: Worker, job: Job, device: str, progress: Progress = no_progress) -> Outcome:
    """Do a job in a worker process."""
    try:
        return Outcome(worker(job, device, progress))
    except InputError as error:
        return Outcome(error="InputError", text=str(error))
    except MemoryError as error:
        return Outcome(error="MemoryError", text=str(error))
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return Outcome(error="WorkerError", text=text, trace=traceback.format_exc())
