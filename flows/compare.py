"""`python -m flows.compare`: NIRVANA and its rivals under one protocol.

Prunes the model of params.yaml by every method, at every ratio, with and without compensation; ends in a table and a
picture. A run that was stopped goes on where it was, and asks for no backward pass twice.
"""

import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import flows.environment as environment  # before prefect, which reads it when imported

# isort: split
import typer
from prefect import State, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed, Failed
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from flows.leash import hold_temporary_server
from flows.step import StepFailedError, bring_up_to_date
from nirvana.errors import InputError
from tasks.params import load_params
from tasks.process import ERROR_PREFIX, prepare_environment
from tasks.registry import paths

PICTURE = Path("reports/studies/compare.png")
TOKENS, COMPENSATION_SEQUENCES = 4096, 32
WAIT_SECONDS = 3600


@dataclass(frozen=True)
class Asked:
    """What the command line says; None: the study's default."""

    ratios: tuple[float, ...] | None = None
    methods: tuple[str, ...] | None = None
    ids: Path | None = None
    model: Path | None = None
    tokens: int = TOKENS
    compensation_sequences: int = COMPENSATION_SEQUENCES
    seeds: int = 1


@task(cache_policy=NO_CACHE, persist_result=False)
def prepare(asked: Asked) -> dict[str, Path]:
    """Have DVC bring the model, and unless ids are given the text, up to date; return where they are."""
    steps = [] if asked.model else ["fetch_model"]
    steps += [] if asked.ids else ["fetch_corpus", "sample_pool"]
    for step in steps:
        bring_up_to_date(step, get_run_logger(), WAIT_SECONDS)
    files = paths("fetch_model")[1] | paths("fetch_corpus")[1] | paths("sample_pool")[1]
    return files | ({"model": asked.model} if asked.model else {})


@task(cache_policy=NO_CACHE, persist_result=False)
def read_texts(asked: Asked, files: dict[str, Path]) -> Any:
    """Read what every method calibrates on and is judged by."""
    from tasks.studies.texts import texts_of_ids, texts_of_pipeline

    if asked.ids:
        return texts_of_ids(asked.ids, asked.tokens, asked.compensation_sequences)
    return texts_of_pipeline(load_params(), files["model"], files, asked.tokens, asked.compensation_sequences)


@task(cache_policy=NO_CACHE, persist_result=False)
def measure(model: Path, texts: Any, settings: Any) -> list[dict[str, Any]]:
    """Prune and judge."""
    from tasks.studies import compare as study

    return study.measure(study.Comparison(model, texts), settings)


@task(cache_policy=NO_CACHE, persist_result=False)
def report(lines: list[Any]) -> list[Path]:
    """Write table and picture."""
    from tasks.studies.leaderboard import write_leaderboard
    from tasks.studies.leaderboard_plot import draw

    return [*draw(lines, PICTURE), write_leaderboard(lines, PICTURE.with_suffix(".csv"))]


@task(cache_policy=NO_CACHE, persist_result=False)
def record(parameters: dict[str, Any], lines: list[Any], files: list[Path], conclusion: str) -> str:
    """Record the study in MLflow: a parent, and a child a method and compensation."""
    from tasks.studies.leaderboard import series
    from tasks.studies.tracking import record_study

    return record_study("compare", parameters, series(lines), files, conclusion)


@flow(name="compare", persist_result=False, validate_parameters=False)
def compare(asked: Asked, threads: int | None = None) -> State:
    """Compare methods, each at the same ratios on the same text.

    Args:
        asked: What the command line says.
        threads: Intra-op threads; None: params.yaml's.
    """
    os.chdir(environment.ROOT)
    logger = get_run_logger()
    start = time.monotonic()
    try:
        prepare_environment(threads or load_params().compute.threads, online=False)
        settings = _settings(asked)
        files = prepare(asked)
        texts = read_texts(asked, files)
        logger.info("%d rows to measure or read back", 1 + len(list(settings.cells())))
        rows = measure(files["model"], texts, settings)
        lines, conclusion = _judged(rows, _reference(settings))
        written = report(lines)
        run_id = record(_parameters(settings, texts), lines, written, "\n\n".join(conclusion))
    except (InputError, StepFailedError) as error:
        return Failed(message=str(error))
    _print_result(lines, _reference(settings), conclusion, written, run_id)
    Console().print(f"main job: {time.monotonic() - start:.0f} s", highlight=False)
    return Completed(message=conclusion[0])


def _settings(asked: Asked) -> Any:
    from tasks.studies.compare import Settings

    settings = replace(Settings(), seeds=asked.seeds)
    settings = settings if asked.ratios is None else replace(settings, ratios=asked.ratios)
    return settings if asked.methods is None else replace(settings, methods=asked.methods)


def _reference(settings: Any) -> tuple[str, str]:
    """Return the method that the others are compared with: ours if it takes part, else the first that is asked for."""
    from tasks.studies.compare import BEST

    if BEST[0] in settings.methods:
        return BEST
    return settings.methods[0], next(cell[2] for cell in settings.cells())


def _judged(rows: list[dict[str, Any]], reference: tuple[str, str]) -> tuple[list[Any], list[str]]:
    from tasks.studies.leaderboard import leaderboard, verdict

    lines = leaderboard(rows, reference)
    return lines, verdict(lines, reference)


def _parameters(settings: Any, texts: Any) -> dict[str, Any]:
    digests = {name: getattr(texts, name).digest for name in ("calibration", "compensation", "heldout", "evaluation")}
    shapes = {name: list(getattr(texts, name).ids.shape) for name in digests}
    return {**asdict(settings), "text": digests, "sequences_and_tokens": shapes}


def _print_result(
    lines: list[Any], reference: tuple[str, str], conclusion: list[str], files: list[Path], run_id: str
) -> None:
    from tasks.studies.leaderboard import shown

    console = Console()
    console.width = max(console.width, 92)  # a broken line is worse to read than a long one
    heading, *rows = shown(lines, reference)
    title = "Methods by ratio and perplexity; loss in nats a token, with its 95 % interval"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for number, name in enumerate(heading):
        table.add_column(name, justify="left" if number == 1 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if any(line.off_budget for line in lines):
        console.print("*  more than 0.5 point off the budget", highlight=False)
    console.print(*conclusion, sep="\n", highlight=False)
    console.print(*(f"wrote  {file}" for file in files), f"MLflow run  {run_id}", sep="\n", highlight=False)


def _numbers(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        values = ()
    if not values or not all(0 < value < 1 for value in values):
        raise InputError(f"--ratios: expected numbers between 0 and 1 such as 0.2,0.4, got {text}; correct them")
    return values


def _methods(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    from tasks.studies.methods import NAMES

    names = NAMES if text == "all" else tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise InputError(f"--methods: expected all or some of {','.join(NAMES)}, got {','.join(unknown)}; correct them")
    return names


def main(
    ratios: Annotated[str | None, typer.Option(help="Pruning ratios, e.g. 0.2,0.4.")] = None,
    methods: Annotated[str | None, typer.Option(help="Methods, e.g. nirvana,fisher,flap; or all.")] = None,
    ids: Annotated[
        Path | None, typer.Option(help="Directory of JSON files of token ids, in place of the pipeline's text.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Model directory, in place of the pipeline's.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Evaluation tokens.")] = TOKENS,
    compensation_sequences: Annotated[
        int, typer.Option(min=1, help="Sequences that compensation is fitted on.")
    ] = COMPENSATION_SEQUENCES,
    seeds: Annotated[int, typer.Option(min=1, help="Of the methods that draw something.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Intra-op threads; params.yaml's by default.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Three methods, one ratio, 2,048 tokens: to see that it works.")
    ] = False,
) -> None:
    """Compare NIRVANA and its rivals under one protocol."""
    try:
        asked = Asked(
            _numbers(ratios),
            _methods(methods),
            ids.resolve() if ids else None,
            model.resolve() if model else None,
            tokens,
            compensation_sequences,
            seeds,
        )
    except InputError as error:
        raise SystemExit(f"{ERROR_PREFIX}{error}") from None
    if quick:
        names = asked.methods or ("nirvana", "fisher", "flap")
        asked = replace(asked, tokens=min(tokens, 2048), ratios=asked.ratios or (0.4,), methods=names)
    if not PREFECT_API_URL.value():
        hold_temporary_server()
    try:
        state = compare(asked, threads, return_state=True)
    except KeyboardInterrupt:
        sys.stderr.write(f"{ERROR_PREFIX}interrupted; run the same command again, finished rows stay\n")
        sys.exit(130)
    if not state.is_completed():
        sys.stderr.write(f"{ERROR_PREFIX}{state.message}\n")
        sys.exit(1)


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        typer.run(main)
