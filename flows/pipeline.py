"""The Prefect flow: one task a step, in order. DVC decides whether a step runs; Prefect shows it.

Run it with `python -m flows.pipeline`. Prefect caches nothing here: a second memory beside DVC's would show the
results of another experiment as current.
"""

import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any

import flows.environment as environment  # before prefect, which reads it when imported

# isort: split
import typer
from prefect import State, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed

from flows.early import fault_known_early, show_estimate
from flows.kill_with_parent import die_with_schedule
from flows.prefect_server import prefect_fault
from flows.step import StepFailedError, bring_up_to_date
from flows.summary import StepResult, print_summary
from nirvana.errors import InputError
from tasks.params import load_params
from tasks.record import is_recorded, record_failure
from tasks.registry import STEPS
from tasks.tracking.mlflow_store import is_store_fault
from tasks.tracking.redaction import redact
from tasks.workers.child import DRIVER_PID
from tasks.workers.process import ERROR_PREFIX, WARNING_PREFIX, log_file

WAIT_MINUTES = 60


def _drop_empty_traceback(record: logging.LogRecord) -> bool:
    """Prefect logs a failed state with `exc_info`, even where no exception is: "NoneType: None"."""
    if record.exc_info and record.exc_info[0] is None:
        record.exc_info = None
    return True


for _name in ("prefect.task_runs", "prefect.flow_runs"):
    logging.getLogger(_name).addFilter(_drop_empty_traceback)

CACHED = "Cached"
NOT_RECORDED = "Not recorded"


@task(task_run_name="{step}", cache_policy=NO_CACHE, persist_result=False)
def bring_step_up_to_date(step: str, wait_minutes: int) -> State:
    """Run one step if DVC finds it changed; the state is Completed, Cached or Failed."""
    return _bring(step, wait_minutes, get_run_logger())


def _bring(step: str, wait_minutes: int, logger: Any) -> State:
    # the run may be missing though nothing changed: a pulled clone, another MLflow server, one that was down
    force = step == "record" and not is_recorded()
    try:
        ran = bring_up_to_date(step, logger, wait_minutes * 60, force)
    except StepFailedError as error:
        return Failed(message=redact(str(error)))
    return Completed() if ran else Completed(name=CACHED, message="up to date, or restored from DVC's cache")


@flow(name="nirvana", persist_result=False, validate_parameters=True)
def pipeline(until: str | None = None, wait_minutes: int = WAIT_MINUTES) -> State:
    """Bring every step up to date, in order.

    Args:
        until: Stop after this step.
        wait_minutes: How long to wait for another process that works on the same files.
    """
    die_with_schedule()
    logger = get_run_logger()

    def bring(step: str) -> State:
        try:
            return bring_step_up_to_date(step, wait_minutes, return_state=True)
        except Exception as error:  # Prefect's own: a server that went away, a full disk
            logger.warning("Prefect cannot show %s (%s)", step, " ".join(str(error).split())[:200])
            return _bring(step, wait_minutes, logger)

    return _run(until, bring, logger)


def _without_prefect(until: str | None, wait_minutes: int) -> State:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True)
    for noisy in ("httpx", "alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logger = logging.getLogger("nirvana.flow")
    return _run(until, lambda step: _bring(step, wait_minutes, logger), logger)


def _run(until: str | None, bring: Callable[[str], State], logger: Any) -> State:
    os.chdir(environment.ROOT)
    try:
        load_params()
        names = _names(until)
    except InputError as error:
        return _ended(_fail("params", str(error), logger))
    os.environ[DRIVER_PID] = str(os.getpid())
    try:
        return _ended(_bring_all_up_to_date(names, bring, logger))
    finally:
        del os.environ[DRIVER_PID]


_ends: list[State] = []
"""How the steps ended: Prefect may fail to take note of it."""


def _ended(state: State) -> State:
    _ends.append(state)
    return state


def _bring_all_up_to_date(names: list[str], bring: Callable[[str], State], logger: Any) -> State:
    start = time.monotonic()
    results = []
    for number, name in enumerate(names, 1):
        if name == "sample_pool" and (fault := fault_known_early(logger)):  # model and corpus are there
            return _fail("check", fault, logger)
        if name == "generate_text":  # the first to compute on the model
            show_estimate()
        logger.info("[%d/%d] %s", number, len(names), name)
        step_start = time.monotonic()
        state = bring(name)
        message = state.message or f"{name} failed"
        if not state.is_completed() and not (name == "record" and is_store_fault(message)):
            return _fail(name, message, logger)
        outcome = (state.name or "") if state.is_completed() else NOT_RECORDED
        results.append(StepResult(name, outcome, time.monotonic() - step_start))
    print_summary(results, time.monotonic() - start)
    if results[-1].state == NOT_RECORDED:
        sys.stderr.write(f"{WARNING_PREFIX}not recorded: {message}; results stand, the next run records them\n")
        return Completed(message="not recorded")
    ran = sum(result.state != CACHED for result in results)
    return Completed(message=f"{ran} of {len(results)} steps ran" if ran else "nothing changed")


def _names(until: str | None) -> list[str]:
    names = [step.name for step in STEPS]
    if until is None:
        return names
    if until not in names:
        raise InputError(f"until: expected one of {', '.join(names)}, got {until!r}; correct it")
    return names[: names.index(until) + 1]


def _fail(step: str, error: str, logger: Any) -> State:
    error = redact(error)
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
        int, typer.Option(min=0, max=60 * 24 * 365, help="Minutes to wait for another process on the same files.")
    ] = WAIT_MINUTES,
) -> None:
    """Run the pipeline that params.yaml describes; unchanged steps are not run again."""
    os.chdir(environment.ROOT)
    try:
        state = _shown_if_possible(until, wait_minutes)
    except KeyboardInterrupt:
        sys.stderr.write(f"{ERROR_PREFIX}interrupted; run the same command again, finished steps stay\n")
        sys.exit(130)
    if not state.is_completed():
        sys.stderr.write(f"{ERROR_PREFIX}{state.message}\n")
        sys.exit(1)


def _shown_if_possible(until: str | None, wait_minutes: int) -> State:
    """Run the flow, or its steps without Prefect where that cannot show them."""
    fault = prefect_fault()
    if fault is None:
        try:
            return pipeline(until, wait_minutes, return_state=True)
        except Exception as error:  # Prefect's own: ours become states
            if _ends:
                return _ends[-1]
            fault = f"Prefect: expected it to show this run, got {redact(' '.join(str(error).split())[:300])}"
    sys.stderr.write(f"{WARNING_PREFIX}{fault}; the steps run without it\n")
    return _without_prefect(until, wait_minutes)


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        typer.run(main)
