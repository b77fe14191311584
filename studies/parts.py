"""Do the parts of a study that trains its own models, several at a time."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tasks.workers.jobs import Job, Worker
from tasks.workers.process_pool import run_in_processes


def run_parts(
    do_part: Worker, arguments: Sequence[Mapping[str, Any]], cache: Path, description: str, processes: int
) -> list[Any]:
    """Do every part; return the values in the order of `arguments`.

    Args:
        do_part: Returns a part's value as JSON; a function of a module, which other processes find by its name.
        arguments: Of each part, small enough to be sent to another process.
        cache: The study's directory, where the parts keep what they compute.
        description: Stands before the progress bar.
        processes: Of one thread each; 1: all in this one.

    Raises:
        InputError: What a part raised, or that two processes were killed at one.
    """
    values: dict[int, Any] = {}
    jobs = [Job(index, cache, arguments=each) for index, each in enumerate(arguments)]
    with tqdm(total=len(jobs), desc=description, unit="part") as bar:

        def finish(job: Job, value: bytes) -> None:
            values[job.index] = json.loads(value)
            bar.update()

        if processes == 1:
            for job in jobs:
                finish(job, do_part(job, "cpu", lambda share: None))
        else:
            run_in_processes(do_part, jobs, ["cpu"] * processes, 1, finish)
    return [values[index] for index in range(len(jobs))]
