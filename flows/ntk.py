"""`python -m flows.ntk`: does pruning by NIRVANA leave the kernel alone that governs training?

Trains tiny transformers on the corpus of params.yaml, prunes them in three ways, compares their SignGD kernels and
fine-tunes them. Minutes on two cores; a run that was stopped goes on where it was.
"""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import flows.environment as environment  # before prefect, which reads it when imported

# isort: split
import typer
from prefect import State, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed, Failed
from rich.console import Console
from rich.table import Table

from flows.leash import hold_temporary_server
from nirvana.errors import InputError
from tasks.params import load_params
from tasks.process import ERROR_PREFIX, prepare_environment

PICTURE = Path("reports/studies/ntk.png")
PROCESSES = 2


@task(cache_policy=NO_CACHE, persist_result=False)
def fetch_corpus() -> Path:
    """Bring the text."""
    from tasks.studies.ntk_run import fetched_corpus

    return fetched_corpus(load_params())


@task(cache_policy=NO_CACHE, persist_result=False)
def measure(settings: Any, corpus: Path, processes: int) -> dict[str, Any]:
    """Train, prune, measure, fine-tune."""
    from tasks.studies import ntk_run

    return ntk_run.measure(settings, corpus, processes)


@task(cache_policy=NO_CACHE, persist_result=False)
def report(settings: Any, found: dict[str, Any]) -> list[Path]:
    """Write tables and picture."""
    from tasks.studies.ntk_plot import draw
    from tasks.studies.ntk_summary import write_tables

    kernels, curves = found["kernels"], found["curves"]
    tables = write_tables(kernels, curves, PICTURE.with_suffix(".csv"))
    return [*draw(kernels, curves, settings.finetuned_ratio, PICTURE), *tables]


@task(cache_policy=NO_CACHE, persist_result=False)
def record(settings: Any, found: dict[str, Any], files: list[Path], conclusion: str) -> str:
    """Record the study in MLflow: a parent, and a child a method."""
    from tasks.studies.ntk_summary import series
    from tasks.studies.tracking import record_study

    return record_study("ntk", asdict(settings), series(found["kernels"], found["curves"]), files, conclusion)


@flow(name="ntk", persist_result=False, validate_parameters=False)
def ntk(quick: bool = False, gamma: float | None = None, processes: int = PROCESSES) -> State:
    """Measure the SignGD kernel before and after pruning, and what fine-tuning makes of it.

    Args:
        quick: Few and hardly trained models: to see that it works.
        gamma: MLP rate / attention rate of every method; None: the paper's.
        processes: Models worked on at a time, each by one thread.
    """
    os.chdir(environment.ROOT)
    prepare_environment(threads=1, online=True)
    from tasks.studies.ntk import QUICK, Settings
    from tasks.studies.ntk_summary import verdict

    logger = get_run_logger()
    start = time.monotonic()
    settings = QUICK if quick else Settings()
    settings = settings if gamma is None else replace(settings, gamma=gamma)
    try:
        corpus = fetch_corpus()
        logger.info("training and pruning %d models", settings.seeds)
        found = measure(settings, corpus, processes)
        conclusion = verdict(found["kernels"], found["curves"], settings.finetuned_ratio)
        files = report(settings, found)
        run_id = record(settings, found, files, "\n\n".join(conclusion))
    except InputError as error:
        return Failed(message=str(error))
    _print_result(found, conclusion, files, run_id)
    Console().print(f"main job: {time.monotonic() - start:.0f} s", highlight=False)
    return Completed(message=conclusion[0])


def _print_result(found: dict[str, Any], conclusion: Sequence[str], files: Sequence[Path], run_id: str) -> None:
    from tasks.studies.ntk_summary import curve_table, kernel_table

    console = Console()
    seeds = len(found["models"])
    console.print(
        _table(
            f"Relative change of the SignGD kernel, mean ± deviation of {seeds} models", kernel_table, found["kernels"]
        )
    )
    console.print(_table("Held-out loss, nats a token, around fine-tuning", curve_table, found["curves"]))
    console.print(*conclusion, sep="\n", highlight=False)
    console.print(*(f"wrote  {file}" for file in files), f"MLflow run  {run_id}", sep="\n", highlight=False)


def _table(title: str, rows_of: Any, measured: Sequence[Any]) -> Table:
    heading, *rows = rows_of(measured)
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(heading):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="Few and hardly trained models: to see that it works.")
    ] = False,
    gamma: Annotated[float | None, typer.Option(help="MLP rate / attention rate of every method.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Models worked on at a time.")] = PROCESSES,
) -> None:
    """Compare the SignGD kernel before and after pruning by saliency, by magnitude and at random."""
    if not PREFECT_API_URL.value():
        hold_temporary_server()
    try:
        state = ntk(quick, gamma, processes, return_state=True)
    except KeyboardInterrupt:
        sys.stderr.write(f"{ERROR_PREFIX}interrupted; run the same command again, finished parts stay\n")
        sys.exit(130)
    if not state.is_completed():
        sys.stderr.write(f"{ERROR_PREFIX}{state.message}\n")
        sys.exit(1)


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        typer.run(main)
