"""`python -m flows.study NAME`: a study, from its spec (`studies/specs/NAME.yaml`) to a picture, CSV files and MLflow.

Every setting of a study is an option (`--ratios 0.2,0.4`, or `-S ratios=0.2,0.4`); `python -m flows.study NAME --help`
lists them. `python -m flows.NAME` is another name of the same. A run that was stopped goes on where it was.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import click

import flows.environment as environment  # before prefect, which reads it when imported

# isort: split
from prefect import State, flow, get_run_logger
from prefect import task as prefect_task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed
from rich.console import Console

from flows.outcome import show
from flows.prefect_server import prefect_fault
from flows.step import StepFailedError, bring_up_to_date
from nirvana.errors import InputError
from nirvana.presets import COMPENSATION_SEQUENCES
from studies.spec import Spec, load_spec, study_names
from studies.subject import SELF_GENERATED, TOKENS, Asked
from tasks.params import load_params
from tasks.registry import paths
from tasks.workers.process import ERROR_PREFIX, prepare_environment

_WAIT_SECONDS = 3600
REFUSED = "Refused"
"""State of a step whose input cannot be; any other error is ours, and shows where it comes from."""
_INTERRUPTED = "interrupted; run the same command again, finished parts stay"

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _option(name: str, help_: str, **more: Any) -> click.Option:
    return click.Option([f"--{name.replace('_', '-')}"], help=help_, show_default="default" in more, **more)


def _path(name: str, help_: str) -> click.Option:
    return _option(name, help_, type=click.Path(path_type=Path))


def _count(name: str, help_: str, least: int = 1, default: int | None = None) -> click.Option:
    return _option(name, help_, type=click.IntRange(least), **({} if default is None else {"default": default}))


OPTIONS: dict[str, Callable[[], click.Option]] = {
    "ids": lambda: _path("ids", "Directory of JSON files of token ids, in place of the pipeline's text."),
    "judge": lambda: _path("judge", "Token ids (.json) or text to judge on, in place of the evaluation split."),
    "model": lambda: _path("model", "Model directory, in place of the pipeline's."),
    "corpus": lambda: _path("corpus", "Directory with documents.jsonl, in place of the pipeline's corpus."),
    "text": lambda: _path("text", "Other text to ask about as well: .txt, .jsonl with a column text, or a directory."),
    "tokens": lambda: _count("tokens", "Evaluation tokens.", 2, TOKENS),
    "compensation_sequences": lambda: _count(
        "compensation_sequences", "Sequences that compensation is fitted on.", 1, COMPENSATION_SEQUENCES
    ),
    "self_generated": lambda: _count(
        "self_generated", "More of them, which the dense model writes itself.", 0, SELF_GENERATED
    ),
    "threads": lambda: _count("threads", "Intra-op threads; params.yaml's by default."),
    "processes": lambda: _count("processes", "Models worked on at a time.", 1, 2),
}


# --- the flow -------------------------------------------------------------------------------------------------


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


def bring(steps: Iterable[str]) -> None:
    """Have DVC bring steps up to date; inside a task or a flow."""
    for step in steps:
        bring_up_to_date(step, get_run_logger(), _WAIT_SECONDS)


def missing(spec: Spec, asked: Asked) -> list[str]:
    """Return the steps that make what a study needs and the user did not give, each after those that it reads."""
    own_text = asked.ids or (asked.corpus and spec.texts_of_corpus)
    texts = "texts" in spec.needs and not own_text
    steps = ["fetch_model"] if "model" in spec.needs and not asked.model else []
    steps += ["fetch_corpus"] if texts or ("corpus" in spec.needs and not asked.corpus) else []
    return steps + (["sample_pool"] if texts else [])


@task
def prepare(spec: Spec, asked: Asked) -> dict[str, Path]:
    """Have DVC bring up to date what is not given; return where model and corpus are."""
    if "documents" in spec.needs:
        from studies.corpus import fetched_corpus

        return {"corpus": fetched_corpus(load_params())}
    bring(missing(spec, asked))
    corpus = asked.corpus if asked.corpus and spec.texts_of_corpus else paths("fetch_corpus")[1]["corpus"]
    return {"model": asked.model or paths("fetch_model")[1]["model"], "corpus": corpus}


@task
def measure(spec: Spec, asked: Asked, files: dict[str, Path], values: Mapping[str, Any]) -> Any:
    """Prune and judge; return rows, not tensors."""
    from studies.run import measure as measured
    from studies.subject import Subject

    return measured(spec, Subject(asked, files, spec.judges_tokens), values)


@task
def report(spec: Spec, measured: Any, values: Mapping[str, Any]) -> Any:
    """Write tables and picture."""
    from studies.run import report as reported

    return reported(spec, measured, values)


@task
def record(spec: Spec, measured: Any, made: Any) -> str:
    """Record the study in MLflow."""
    from studies.run import record as recorded

    return recorded(spec, measured, made)


@flow(persist_result=False, validate_parameters=False)
def study(spec: Spec, asked: Asked, values: Mapping[str, Any]) -> State:
    """Run a study: its outcome printed, errors of the input one line."""
    os.chdir(environment.ROOT)
    start = time.monotonic()
    prepare_environment(
        spec.threads or asked.threads or load_params().compute.threads, online="documents" in spec.needs
    )
    try:
        files = prepare(spec, asked)
        measured = measure(spec, asked, files, values)
        made = report(spec, measured, values)
        run_id = record(spec, measured, made)
    except InputError as error:
        return Failed(message=str(error))
    show(made, run_id)
    Console().print(f"main job: {time.monotonic() - start:.0f} s", highlight=False)
    return Completed(message=made.conclusion[0])


# --- the command line -------------------------------------------------------------------------------------------


def command(name: str, run: Callable[[Spec, Asked, Mapping[str, Any]], None]) -> click.Command:
    """Return a study's command line.

    Args:
        name: Of the study.
        run: Does it.

    Raises:
        InputError: If there is no such study.
    """
    spec = load_spec(name)
    settings = [_option(key, setting.help, metavar="VALUE") for key, setting in spec.settings.items()]
    assigned = click.Option(["-S", "assignments"], multiple=True, metavar="KEY=VALUE", help="The same, as a setting.")
    quick = click.Option(["--quick"], is_flag=True, help="Few and small: to see that it works.")

    def called(assignments: tuple[str, ...], **given: Any) -> None:
        changed = {key: given.pop(key) for key in spec.settings}
        changed = {key: value for key, value in changed.items() if value is not None} | _read(assignments)
        for key in ("ids", "judge", "model", "corpus", "text"):
            given[key] = given[key].resolve() if given.get(key) else None
        run(spec, Asked(**given).limited(), spec.values(given["quick"], changed))

    options = [OPTIONS[key]() for key in spec.options]
    return click.Command(name, callback=called, params=[*settings, assigned, *options, quick], help=spec.question)


def _read(assignments: Iterable[str]) -> dict[str, str]:
    pairs = [each.partition("=") for each in assignments]
    if odd := [key for key, equals, _ in pairs if not equals]:
        raise InputError(f"-S: expected KEY=VALUE such as ratios=0.2,0.4, got {odd[0]}; correct it")
    return {key: value for key, _, value in pairs}


def run(spec: Spec, asked: Asked, values: Mapping[str, Any]) -> None:
    """Run a study's flow, beside a temporary Prefect server unless one is configured; end the process if it fails."""
    os.chdir(environment.ROOT)
    if fault := prefect_fault():  # its results are this flow's: it cannot do without
        sys.stderr.write(f"{ERROR_PREFIX}{fault}\n")
        sys.exit(1)
    named = study.with_options(name=spec.name.replace("_", "-"))
    try:
        state: State[Any] = named(spec, asked, values, return_state=True)  # type: ignore[assignment]
    except KeyboardInterrupt:
        sys.stderr.write(f"{ERROR_PREFIX}{_INTERRUPTED}\n")
        sys.exit(130)
    if not state.is_completed():
        sys.stderr.write(f"{ERROR_PREFIX}{state.message}\n")
        sys.exit(1)


def main(name: str | None = None) -> None:
    """Run the study of that name, or of the command line's first argument."""
    arguments = sys.argv[1:]
    if name is None and (not arguments or arguments[0] in ("-h", "--help")):
        Console().print("usage: python -m flows.study NAME [OPTIONS]", *study_names(), sep="\n  ", highlight=False)
        return
    with suppress(BrokenPipeError):
        try:
            chosen = name or arguments.pop(0)
            command(chosen, run).main(arguments, prog_name=f"python -m flows.study {chosen}")
        except InputError as error:
            raise SystemExit(f"{ERROR_PREFIX}{error}") from None


if __name__ == "__main__":
    main()
