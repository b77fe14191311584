"""What every study's flow shares, so that `flows/<study>.py` holds its own steps and options only.

@study
def gamma_sweep(asked: Asked, settings: Any) -> Outcome: ...   # a Prefect flow; errors of the input end it

def main(ids: IdsOption = None, ...) -> None:
    with one_line_errors():
        asked = Asked.of(ids, model, tokens, threads)
    run(gamma_sweep, asked, settings)
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import flows.environment as environment  # before prefect, which reads it when imported

# isort: split
from prefect import Flow, State, flow, get_run_logger
from prefect import task as prefect_task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed
from rich.console import Console

from flows.options import QUICK_COMPENSATION_SEQUENCES, QUICK_SELF_GENERATED, QUICK_TOKENS, TOKENS
from flows.outcome import Outcome, show
from flows.prefect_server import prefect_fault
from flows.step import StepFailedError, bring_up_to_date
from nirvana.errors import InputError
from tasks.params import load_params
from tasks.registry import paths
from tasks.workers.process import ERROR_PREFIX, prepare_environment

PICTURES = Path("reports/studies")
_FEWEST = 2
"""Evaluation tokens that are read and not used."""
_WAIT_SECONDS = 3600
REFUSED = "Refused"
"""State of a step whose input cannot be; any other error is ours, and shows where it comes from."""
_INTERRUPTED = "interrupted; run the same command again, finished parts stay"

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Asked:
    """What the command line says of a study that prunes the model of params.yaml, or another."""

    ids: Path | None = None
    model: Path | None = None
    tokens: int = TOKENS
    compensation_sequences: int = QUICK_COMPENSATION_SEQUENCES  # of a study that fits nothing on them
    self_generated: int = 0
    threads: int | None = None
    judge: Path | None = None

    @classmethod
    def of(
        cls,
        ids: Path | None,
        model: Path | None,
        tokens: int,
        threads: int | None,
        quick: bool = False,
        judge: Path | None = None,
        *,
        compensation_sequences: int = QUICK_COMPENSATION_SEQUENCES,
        self_generated: int = 0,
    ) -> "Asked":
        """Resolve the paths against where the user stands; `quick` limits tokens and sequences."""
        if quick:
            tokens = min(tokens, QUICK_TOKENS)
            compensation_sequences = min(compensation_sequences, QUICK_COMPENSATION_SEQUENCES)
            self_generated = min(self_generated, QUICK_SELF_GENERATED)
        ids, model, judge = (each.resolve() if each else None for each in (ids, model, judge))
        return cls(ids, model, tokens, compensation_sequences, self_generated, threads, judge)


class Subject(NamedTuple):
    """What is pruned, and `studies.comparison.Texts` to prune and judge it by."""

    model: Path
    texts: Any


def task(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make a step of a study a Prefect task; studies.store remembers what it finds, Prefect does not.

    Errors of the input fail it with one line, without a traceback, and go on to the flow.
    """

    @prefect_task(cache_policy=NO_CACHE, persist_result=False)
    @wraps(function)
    def attempt(*arguments: Arguments.args, **named: Arguments.kwargs) -> Any:
        try:
            return function(*arguments, **named)
        except (InputError, StepFailedError) as error:
            return Failed(message=str(error), name=REFUSED)

    @wraps(function)
    def step(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        state: Any = attempt(*arguments, **named, return_state=True)
        if state.name == REFUSED:
            raise InputError(state.message)
        return cast(Result, state.result())

    return step


def study(function: Callable[..., Outcome]) -> Flow[..., Any]:
    """Make a function a Prefect flow of its name: in the checkout, timed, its outcome printed, errors one line."""

    @wraps(function)
    def run_it(*arguments: Any, **named: Any) -> State:
        os.chdir(environment.ROOT)
        start = time.monotonic()
        try:
            outcome = function(*arguments, **named)
        except InputError as error:
            return Failed(message=str(error))
        show(outcome)
        Console().print(f"main job: {time.monotonic() - start:.0f} s", highlight=False)
        return Completed(message=outcome.conclusion[0])

    name = function.__name__.replace("_", "-")
    return flow(name=name, persist_result=False, validate_parameters=False)(run_it)


def run(study_flow: Flow[..., Any], *arguments: Any) -> None:
    """Run a study's flow, beside a temporary Prefect server unless one is configured; end the process if it fails."""
    os.chdir(environment.ROOT)
    if fault := prefect_fault():  # its results are this flow's: it cannot do without
        sys.stderr.write(f"{ERROR_PREFIX}{fault}\n")
        sys.exit(1)
    try:
        state: State[Any] = study_flow(*arguments, return_state=True)  # type: ignore[assignment]
    except KeyboardInterrupt:
        sys.stderr.write(f"{ERROR_PREFIX}{_INTERRUPTED}\n")
        sys.exit(130)
    if not state.is_completed():
        sys.stderr.write(f"{ERROR_PREFIX}{state.message}\n")
        sys.exit(1)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line where what the command line says cannot be."""
    try:
        yield
    except InputError as error:
        raise SystemExit(f"{ERROR_PREFIX}{error}") from None


# --- steps ----------------------------------------------------------------------------------------------------


def set_environment(asked: Asked) -> None:
    """Set threads, and no network; `subject` does, and who imports torch before calling it must have done."""
    prepare_environment(asked.threads or load_params().compute.threads, online=False)


def subject(asked: Asked) -> Subject:
    """Have DVC bring up to date what is asked for, and read the texts."""
    set_environment(asked)
    files = prepare(asked)
    return Subject(files["model"], read_texts(asked, files))


def bring(steps: Iterable[str]) -> None:
    """Have DVC bring steps up to date; inside a task or a flow."""
    for step in steps:
        bring_up_to_date(step, get_run_logger(), _WAIT_SECONDS)


@task
def prepare(asked: Asked) -> dict[str, Path]:
    """Have DVC bring the model, and unless ids are given the text, up to date; return where they are."""
    steps = [] if asked.model else ["fetch_model"]
    steps += [] if asked.ids else ["fetch_corpus", "sample_pool"]
    bring(steps)
    files = paths("fetch_model")[1] | paths("fetch_corpus")[1] | paths("sample_pool")[1]
    return files | ({"model": asked.model} if asked.model else {})


@task
def read_texts(asked: Asked, files: dict[str, Path]) -> Any:
    """Read what every method calibrates on and is judged by."""
    from studies.texts import judged_on, texts_of_ids, texts_of_pipeline, with_generated

    # what another text is judged by says nothing of how much this one has to hold
    sizes = (_FEWEST if asked.judge else asked.tokens, asked.compensation_sequences)
    params = None
    if asked.ids:
        texts = texts_of_ids(asked.ids, *sizes)
    else:
        params = load_params()
        texts = texts_of_pipeline(params, files["model"], files["corpus"], *sizes)
    texts = with_generated(texts, files["model"], asked.self_generated, params)
    return judged_on(texts, asked.judge, files["model"], asked.tokens) if asked.judge else texts


@task
def record(
    name: str, parameters: dict[str, Any], children: dict[str, Any], files: Sequence[Path], conclusion: Sequence[str]
) -> str:
    """Record a study in MLflow: a parent, and a child a variant (`studies.tracking.Series`)."""
    from studies.tracking import record_study

    return record_study(name, parameters, children, files, "\n\n".join(conclusion))


def text_parameters(texts: Any) -> dict[str, Any]:
    """Return digests and shapes of the texts, for `record`."""
    names = ("calibration", "compensation", "heldout", "evaluation")
    digests = {name: getattr(texts, name).digest for name in names}
    return {"text": digests, "sequences_and_tokens": {name: list(getattr(texts, name).ids.shape) for name in names}}


def fitted_on(texts: Any, asked: Asked) -> str:
    """Return a note of what compensation was fitted on."""
    sequences, length = texts.compensation.ids.shape
    own = f", {asked.self_generated} x {length} of them the dense model's own" if asked.self_generated else ""
    return f"compensation was fitted on {sequences} x {length} tokens{own}"
