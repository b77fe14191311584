"""`python -m benchmarks.reliability.kills`: kill the pipeline at random moments, run it again, compare every byte.

From the state before a step, the step is started and something is killed (SIGKILL) at a random moment before, in or
after the step's own process: everything (driver, DVC, step, workers), only the driver, or only the step. Nothing may
go on running, and the same command then has to finish with what a run has that was never disturbed
(benchmarks/reliability/compare.py). Every step has its turn; without Prefect only that step is run, for those before it
are done and are no part of the comparison's risk. At the end come journeys: the whole flow under Prefect from nothing,
killed again and again on its way.

Results are kept in .cache/reliability/kills.jsonl, so that a stopped run goes on where it was.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer

from benchmarks.reliability.checkout import WORK, Prepared, copy_checkout, finish, prepared, said_file, start
from benchmarks.reliability.compare import differing
from benchmarks.reliability.results import Results, chosen
from tasks.registry import STEPS
from tasks.workers.process import read_record

_VICTIMS = ("driver", "step", "all")
_ALONE_SECONDS = 20  # a server that lost its driver has two seconds to end, on a busy machine longer


@dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        number: From 1.
        step: During whose turn.
        victim: `all` of the group, only the `driver`, or only the `step`.
        prefect: Whether the driver is `python -m flows.pipeline`.
    """

    number: int
    step: str
    victim: str
    prefect: bool

    @property
    def name(self) -> str:
        """Its name in the results."""
        return f"{self.number:02d} {self.step}, {self.victim}{' under Prefect' if self.prefect else ''}"


def planned(count: int) -> list[Kill]:
    """Return the kills: all of the group in every step, then the driver, the step or all, every other under Prefect."""
    kills = []
    for number in range(count):
        turn, place = divmod(number, len(STEPS))
        victim = _VICTIMS[(place + turn - 1) % 3] if turn else "all"
        kills.append(Kill(number + 1, STEPS[place].name, victim, bool(turn) and (place + turn) % 2 == 1))
    return kills


def kill_once(run: Prepared, kill: Kill, seed: int = 0) -> tuple[str, str]:
    """Kill once and run again.

    Returns:
        Where the kill hit, and what became of it: `equal`, or what went wrong.
    """
    generator = random.Random(f"{seed} {kill.name}")  # noqa: S311
    path = run.before[kill.step].with_name("killed")
    for attempt in range(4):
        copy_checkout(run.before[kill.step], path)
        known = (read_record(kill.step, path) or {}).get("token")
        process = start(path, kill.step, kill.prefect, first=kill.step)
        _wait_for_moment(process, path, kill, known, run.seconds[kill.step], generator, shorter=2**attempt)
        where = _where(path, kill.step, known)
        if hit(process, path, kill.victim):
            break
    else:
        return "nothing", "failed: the step was over before each of four kills"
    if left := left_running(process, path, kill.victim):
        return where, f"failed: {left} went on running"
    status, said = finish(path, kill.step, kill.prefect, first=kill.step)
    if status:
        return where, f"failed: {said.strip().splitlines()[-1]}"
    wrong = differing(run.finished, path, kill.step)
    return where, f"differs: {', '.join(wrong[:3])}" if wrong else "equal"


def _wait_for_moment(
    process: "subprocess.Popen[bytes]",
    path: Path,
    kill: Kill,
    known: str | None,
    seconds: tuple[float, float],
    generator: random.Random,
    shorter: int,
) -> None:
    """Return at a moment drawn from the time that the driver, the step's process or DVC after it takes."""
    whole, inside = seconds
    parts = ("before", "step", "after") if kill.victim != "step" else ("step",)
    (part,) = generator.choices(parts, (2, 10, 3)[: len(parts)])
    share = generator.random() / shorter
    if part == "before":
        time.sleep(share * max(1.0, whole - inside))
        return
    _wait_for_record(process, path, kill.step, known, ("running",) if part == "step" else ("completed", "failed"))
    time.sleep(share * (inside if part == "step" else 1.0))


def _wait_for_record(
    process: "subprocess.Popen[bytes]", path: Path, step: str, known: str | None, outcomes: tuple[str, ...]
) -> None:
    while process.poll() is None:
        record = read_record(step, path) or {}
        if record.get("token") != known and record.get("outcome") in outcomes:
            return
        time.sleep(0.02)


def _where(path: Path, step: str, known: str | None) -> str:
    record = read_record(step, path) or {}
    if record.get("token") == known:
        return "before the step"
    return "in the step" if record.get("outcome") == "running" else "in DVC, after the step"


def hit(process: "subprocess.Popen[bytes]", path: Path, victim: str) -> bool:
    """Kill a driver with its group, it alone, or the step that runs below it; tell whether there was anything."""
    if process.poll() is not None:
        return False
    if victim == "step":
        steps = [each for each in psutil.Process(process.pid).children() if "tasks" in each.cmdline()[1:3]]
        for each in steps:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        return bool(steps)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL) if victim == "all" else process.kill()
    return True


def left_running(process: "subprocess.Popen[bytes]", path: Path, victim: str) -> str | None:
    """Wait until nothing runs in a checkout any more; end what still does, and name it.

    A driver that lost its step ends by itself, with one line that says so.
    """
    if victim == "step":
        status = process.wait(timeout=300)
        said = said_file(path).read_text(encoding="utf-8", errors="replace")
        if not status or "was killed (signal 9)" not in said or "Traceback" in said:
            return f"the driver, or it did not say so ({said.strip()[-200:]})"
    process.wait(timeout=60)
    deadline = time.monotonic() + _ALONE_SECONDS
    while running := _running_in(path):
        if time.monotonic() > deadline:
            said = " ".join(running[0].cmdline()[:4])
            for each in running:
                each.kill()
            return said
        time.sleep(0.2)
    return None


def _running_in(path: Path) -> list[psutil.Process]:
    found = []
    for each in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if Path(each.cwd()).is_relative_to(path) and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
    return found


def travel(run: Prepared, number: int, kills: int, seed: int = 0) -> tuple[str, str]:
    """Run the whole flow under Prefect from nothing, kill it on its way, compare what it ends with.

    Returns:
        The steps that the kills hit, and what became of it.
    """
    generator = random.Random(f"{seed} journey {number}")  # noqa: S311
    path = copy_checkout(run.before[STEPS[0].name], run.finished.with_name("journey"))
    places = []
    share = sum(inside for _, inside in run.seconds.values()) / kills
    for _ in range(kills):
        done = _steps_done(path)
        process = start(path, prefect=True)
        _wait_for_any(process, path, done)  # what a start costs is no progress
        time.sleep(generator.uniform(0.2, 1.4) * share)
        victim = generator.choice(_VICTIMS)
        place = STEPS[min(_steps_done(path), len(STEPS) - 1)].name
        if not hit(process, path, victim):  # between two steps, or all is done
            victim = "all"
            if not hit(process, path, victim):
                break
        places.append(f"{place} ({victim})")
        if left := left_running(process, path, victim):
            return ", ".join(places), f"failed: {left} went on running"
    status, said = finish(path, prefect=True)
    if status:
        return ", ".join(places), f"failed: {said.strip().splitlines()[-1]}"
    wrong = differing(run.finished, path)
    return ", ".join(places), f"differs: {', '.join(wrong[:3])}" if wrong else "equal"


def _steps_done(path: Path) -> int:
    return sum((read_record(step.name, path) or {}).get("outcome") == "completed" for step in STEPS)


def _wait_for_any(process: "subprocess.Popen[bytes]", path: Path, done: int) -> None:
    """Return when a step runs that was not done."""
    while process.poll() is None and _steps_done(path) == done:
        if any((read_record(step.name, path) or {}).get("outcome") == "running" for step in STEPS[done:]):
            return
        time.sleep(0.05)


def main(
    count: Annotated[int, typer.Option(min=0, help="Kills of one step.")] = 30,
    journeys: Annotated[int, typer.Option(min=0, help="Whole flows under Prefect.")] = 1,
    kills: Annotated[int, typer.Option(min=1, help="Kills in each of them.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    only: Annotated[str | None, typer.Option(help="Only cases whose names hold one of these, commas between.")] = None,
    start_at: Annotated[str | None, typer.Option("--from", help="From the first case whose name holds this.")] = None,
    work: Annotated[Path, typer.Option(help="Where the checkouts and the results are kept.")] = WORK,
    afresh: Annotated[bool, typer.Option(help="Forget earlier results.")] = False,
) -> None:
    """Print a line a kill and how many ended equal; the exit status is 1 unless all did."""
    results, run = Results(work / "kills.jsonl", afresh), prepared(work.resolve())
    all_kills = {kill.name: kill for kill in planned(count)}
    names = [*all_kills, *(f"journey {number + 1} of {kills} kills under Prefect" for number in range(journeys))]
    names = chosen(names, only, start_at)
    for name in names:
        if results.is_known(name):
            continue
        results.start()
        if name in all_kills:
            where, outcome = kill_once(run, all_kills[name], seed)
        else:
            where, outcome = travel(run, int(name.split()[1]), kills, seed)
        results.add(name, outcome == "equal", f"killed {where}: {outcome}")
        for place in ("killed", "journey"):
            shutil.rmtree(work / place, ignore_errors=True)
    sys.stdout.flush()
    raise typer.Exit(results.close(names))


if __name__ == "__main__":
    typer.run(main)
