"""`python -m benchmarks.reliability.kills`: kill the pipeline at random moments, run it again, compare every byte.

From the state before a step, the step is started and everything is killed (SIGKILL to the whole group: driver, DVC,
step, workers) at a moment drawn from the time that it takes; the same command then has to finish with the bytes of a
run that was never disturbed. Every step has its turn, in turn.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.reliability.checkout import copy_checkout, finish, make_checkout, output_files, start
from tasks.registry import STEPS


def prepare(parent: Path, names: list[str]) -> tuple[dict[str, Path], dict[str, float], Path]:
    """Run everything up to the last of these steps once, undisturbed.

    Args:
        parent: Receives the checkouts.
        names: Steps whose turn will come.

    Returns:
        The checkout as it was before each of them, how long each took with its driver, and the finished checkout.
    """
    path, before, seconds = make_checkout(parent), {}, {}
    for step in STEPS:
        if step.name in names:
            before[step.name] = copy_checkout(path, parent / f"before-{step.name}")
        begun = time.monotonic()
        status, said = finish(path, step.name)
        if status:
            raise RuntimeError(f"{step.name}: the undisturbed run failed:\n{said}")
        seconds[step.name] = time.monotonic() - begun
        if set(names) <= before.keys():
            break
    return before, seconds, path


def kill_once(before: Path, finished: Path, step: str, seconds: float, generator: random.Random) -> tuple[str, str]:
    """Kill a step and run it again.

    Returns:
        Where the kill hit, and what became of it: `equal`, or what went wrong.
    """
    path = copy_checkout(before, before.parent / "killed")
    process = start(path, step)
    time.sleep(seconds * generator.uniform(0.2, 1.0))  # before that the driver only imports
    done = process.poll() is not None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    record = path / ".cache/steps" / f"{step}.json"
    known = before / ".cache/steps" / f"{step}.json"
    ran = record.exists() and not known.exists()
    where = "after" if done else ("in the step" if ran and _is_running(record) else "in DVC" if ran else "before")
    status, said = finish(path, step)
    if status:
        return where, f"failed: {said.strip().splitlines()[-1]}"
    expected, found = output_files(finished, step), output_files(path, step)
    differing = [name for name in expected if found.get(name) != expected[name]] + sorted(found.keys() - expected)
    return where, f"differs: {', '.join(differing[:3])}" if differing else "equal"


def _is_running(record: Path) -> bool:
    with suppress(OSError, ValueError):
        return bool(json.loads(record.read_text(encoding="utf-8")).get("outcome") == "running")
    return False


def main(
    count: Annotated[int, typer.Option(min=1, help="Kills.")] = 30,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    steps: Annotated[str | None, typer.Option(help="Only these steps, with commas between.")] = None,
) -> None:
    """Print a line a kill and how many ended equal; the exit status is 1 unless all did."""
    names = steps.split(",") if steps else [step.name for step in STEPS]
    generator = random.Random(seed)  # noqa: S311
    parent = Path(tempfile.mkdtemp(prefix="nirvana-kills-"))
    equal = 0
    try:
        before, seconds, finished = prepare(parent, names)
        for number in range(count):
            step = names[number % len(names)]
            where, outcome = kill_once(before[step], finished, step, seconds[step], generator)
            equal += outcome == "equal"
            sys.stdout.write(f"{number + 1:3d}  {step:20s} killed {where:12s} {outcome}\n")
            sys.stdout.flush()
    finally:
        shutil.rmtree(parent, ignore_errors=True)
    sys.stdout.write(f"{equal} of {count}\n")
    raise typer.Exit(0 if equal == count else 1)


if __name__ == "__main__":
    typer.run(main)
