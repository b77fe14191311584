"""The Prefect flow: one task a step, in order. DVC decides whether a step runs; Prefect shows it.

Run it with `python -m flows.pipeline`. Prefect caches nothing here: a second memory beside DVC's would show the
results of another experiment as current.
"""

import logging
import os
import subprocess
import sys
import time
from contextlib import suppress
from typing import Annotated, Any

import flows.environment as environment  # before prefect, which reads it when imported

# isort: split
import typer
from prefect import State, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed, Failed

from flows.leash import die_with_schedule, hold_temporary_server
from flows.step import StepFailedError, bring_up_to_date
from flows.summary import StepResult, print_summary
from nirvana.errors import InputError
from nirvana.files import atomic_file
from tasks.child import DRIVER_PID
from tasks.estimates import shown_file
from tasks.params import load_params
from tasks.process import ERROR_PREFIX, log_file
from tasks.record import is_recorded, record_failure
from tasks.registry import STEPS

WAIT_MINUTES = 60


def _drop_empty_traceback(record: logging.LogRecord) -> bool:
    """Prefect logs a failed state with `exc_info`, even where no exception is: "NoneType: None"."""
    if record.exc_info and record.exc_info[0] is None:
        record.exc_info = None
    return True


for _name in ("prefect.task_runs", "prefect.flow_runs"):
    logging.getLogger(_name).addFilter(_drop_empty_traceback)

CACHED = "Cached"


@task(task_run_name="{step}", cache_policy=NO_CACHE, persist_result=False)
def bring_step_up_to_date(step: str, wait_minutes: int) -> State:
    """Run one step if DVC finds it changed; the state is Completed, Cached or Failed."""
    logger = get_run_logger()
    # the run may be missing though nothing changed: a pulled clone, another MLflow server
    force = step == "record" and not is_recorded()
    try:
        ran = bring_up_to_date(step, logger, wait_minutes * 60, force)
    except StepFailedError as error:
        return Failed(message=str(error))
    return Completed() if ran else Completed(name=CACHED, message="up to date, or restored from DVC's cache")


@flow(name="nirvana", persist_result=False, validate_parameters=True)
def pipeline(until: str | None = None, wait_minutes: int = WAIT_MINUTES) -> State:
    """Bring every step up to date, in order.

    Args:
        until: Stop after this step.
        wait_minutes: How long to wait for another process that works on the same files.
    """
    die_with_schedule()
    os.chdir(environment.ROOT)
    logger = get_run_logger()
    try:
        load_params()
        names = _names(until)
    except InputError as error:
        return _fail("params", str(error), logger)
    os.environ[DRIVER_PID] = str(os.getpid())
    try:
        return _bring_all_up_to_date(names, wait_minutes, logger)
    finally:
        del os.environ[DRIVER_PID]


def _bring_all_up_to_date(names: list[str], wait_minutes: int, logger: Any) -> State:
    start = time.monotonic()
    results = []
    for number, name in enumerate(names, 1):
        if name == "generate_text":  # the first to compute on the model
            _show_estimate()
        logger.info("[%d/%d] %s", number, len(names), name)
        step_start = time.monotonic()
        state = bring_step_up_to_date(name, wait_minutes, return_state=True)
        if not state.is_completed():
            return _fail(name, state.message or f"{name} failed", logger)
        results.append(StepResult(name, state.name or "", time.monotonic() - step_start))
    print_summary(results, time.monotonic() - start)
    ran = sum(result.state != CACHED for result in results)
    return Completed(message=f"{ran} of {len(results)} steps ran" if ran else "nothing changed")


def _show_estimate() -> None:
    """Say what is coming, where model or settings are new; in a process of its own, for it imports torch."""
    file = shown_file(load_params())
    if file is None or file.exists():
        return
    command = [sys.executable, "-m", "tasks.estimates"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        said = done.stdout if done.returncode == 0 else f"no estimate: {done.stderr.strip()[-300:]}\n"
    except subprocess.TimeoutExpired:
        said = "no estimate: it took more than two minutes\n"
    if not file.exists():  # kept too: a run of which nothing changed pays for no second try
        with atomic_file(file) as temporary:
            temporary.write_text(said, encoding="utf-8")
    sys.stderr.write(said)


def _names(until: str | None) -> list[str]:
    names = [step.name for step in STEPS]
    if until is None:
        return names
    if until not in names:
        raise InputError(f"until: expected one of {', '.join(names)}, got {until!r}; correct it")
    return names[: names.index(until) + 1]


def _fail(step: str, error: str, logger: Any) -> State:
    if "was interrupted" not in error:
        try:
            run_id = record_failure(error, step, log_file(step))
            logger.info("recorded the failure as MLflow run %s", run_id)
        except Exception as problem:  # the cause must reach the user even if MLflow does not answer
            logger.warning("could not record the failure in MLflow: %s", " ".join(str(problem).split()))
    return Failed(message=error)


def main(
    until: Annotated[str | None, typer.Option(help="Stop after this step.")] = None,
    wait_minutes: Annotated[
        int, typer.Option(min=0, help="Minutes to wait for another process on the same files.")
    ] = WAIT_MINUTES,
) -> None:
    """Run the pipeline that params.yaml describes; unchanged steps are not run again."""
    if not PREFECT_API_URL.value():
        hold_temporary_server()
    try:
        state = pipeline(until, wait_minutes, return_state=True)
    except KeyboardInterrupt:
        sys.stderr.write(f"{ERROR_PREFIX}interrupted; run the same command again, finished steps stay\n")
        sys.exit(130)
    if not state.is_completed():
        sys.stderr.write(f"{ERROR_PREFIX}{state.message}\n")
        sys.exit(1)


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        typer.run(main)
