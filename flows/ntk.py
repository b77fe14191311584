"""`python -m flows.ntk`: does pruning by NIRVANA leave the kernel alone that governs training?

Trains tiny transformers on the corpus of params.yaml, prunes them in three ways, compares their SignGD kernels and
fine-tunes them. Minutes on two cores; a run that was stopped goes on where it was.
"""

from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.options import ProcessesOption
from flows.outcome import Outcome, as_table
from flows.study import PICTURES, get_run_logger, record, run, study, task
from tasks.params import load_params
from tasks.workers.process import prepare_environment

PICTURE = PICTURES / "ntk.png"
PROCESSES = 2


@task
def fetch_corpus() -> Path:
    """Bring the text."""
    from studies.corpus import fetched_corpus

    return fetched_corpus(load_params())


@task
def measure(settings: Any, corpus: Path, processes: int) -> dict[str, Any]:
    """Train, prune, measure, fine-tune."""
    from studies.ntk import run as ntk_run

    return ntk_run.measure(settings, corpus, processes)


@task
def report(settings: Any, found: dict[str, Any]) -> list[Path]:
    """Write tables and picture."""
    from studies.ntk.plot import draw
    from studies.ntk.summary import write_tables

    kernels, curves = found["kernels"], found["curves"]
    tables = write_tables(kernels, curves, PICTURE.with_suffix(".csv"))
    return [*draw(kernels, curves, settings.finetuned_ratio, PICTURE), *tables]


@study
def ntk(quick: bool = False, gamma: float | None = None, processes: int = PROCESSES) -> Outcome:
    """Measure the SignGD kernel before and after pruning, and what fine-tuning makes of it.

    Args:
        quick: Few and hardly trained models: to see that it works.
        gamma: MLP rate / attention rate of every method; None: the paper's.
        processes: Models worked on at a time, each by one thread.
    """
    prepare_environment(threads=1, online=True)
    from studies.ntk.study import QUICK, Settings
    from studies.ntk.summary import curve_table, kernel_table, series, verdict

    settings = QUICK if quick else Settings()
    settings = settings if gamma is None else replace(settings, gamma=gamma)
    corpus = fetch_corpus()
    get_run_logger().info("training and pruning %d models", settings.seeds)
    found = measure(settings, corpus, processes)
    kernels, curves = found["kernels"], found["curves"]
    conclusion = verdict(kernels, curves, settings.finetuned_ratio)
    files = report(settings, found)
    run_id = record("ntk", asdict(settings), series(kernels, curves), files, conclusion)
    title = f"Relative change of the SignGD kernel, mean ± deviation of {len(found['models'])} models"
    tables = [
        as_table(title, kernel_table(kernels)),
        as_table("Held-out loss, nats a token, around fine-tuning", curve_table(curves)),
    ]
    return Outcome(tables, conclusion, files, run_id)


def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="Few and hardly trained models: to see that it works.")
    ] = False,
    gamma: Annotated[float | None, typer.Option(help="MLP rate / attention rate of every method.")] = None,
    processes: ProcessesOption = PROCESSES,
) -> None:
    """Compare the SignGD kernel before and after pruning by saliency, by magnitude and at random."""
    run(ntk, quick, gamma, processes)


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        typer.run(main)
