"""`python -m flows.families`: does the ranking of the methods hold in other families?

Trains one small transformer a family on the corpus of params.yaml, prunes each by every method and compares. About a
quarter of an hour on two cores; a run that was stopped goes on where it was.
"""

from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.options import ProcessesOption, RatiosOption, names, numbers
from flows.outcome import Outcome, as_table
from flows.study import PICTURES, get_run_logger, one_line_errors, record, run, study, task
from nirvana.files import read_json
from tasks.params import load_params
from tasks.workers.process import prepare_environment

PICTURE = PICTURES / "families.png"
PROCESSES = 2


@task
def fetch_corpus() -> Path:
    """Bring the text."""
    from studies.corpus import fetched_corpus

    return fetched_corpus(load_params())


@task
def measure(settings: Any, corpus: Path, processes: int) -> dict[str, Any]:
    """Train, prune and judge."""
    from studies.families import study as of

    return of.measure(settings, corpus, processes)


@task
def report(lines: list[Any]) -> list[Path]:
    """Write table and picture."""
    from studies.families.plot import draw
    from studies.families.summary import write_lines

    return [*draw(lines, PICTURE), write_lines(lines, PICTURE.with_suffix(".csv"))]


@study
def families(changed: dict[str, Any], quick: bool = False, processes: int = PROCESSES) -> Outcome:
    """Compare methods in one trained model a family.

    Args:
        changed: Fields of `studies.families.study.Settings` that are not the default.
        quick: Few and hardly trained models: to see that it works.
        processes: Models worked on at a time, each by one thread.
    """
    prepare_environment(threads=1, online=True)
    from studies.families.study import QUICK, Settings
    from studies.families.summary import lines_of, notes, ratios_of, series, table, verdict

    settings = replace(QUICK if quick else Settings(), **changed)
    corpus = fetch_corpus()
    get_run_logger().info("training and pruning %d models", len(settings.models()))
    found = measure(settings, corpus, processes)
    lines = lines_of(found["rows"])
    conclusion, files = verdict(lines), report(lines)
    parameters = asdict(settings) | {"corpus": read_json(corpus / "source.json")["digest"]}
    run_id = record("families", parameters, series(lines), files, conclusion)
    tables = [
        as_table(f"Ratio {ratio:g}: loss above the dense model, nats a token", table(lines, ratio))
        for ratio in ratios_of(lines)
    ]
    return Outcome(tables, conclusion, files, run_id, notes(found["rows"], lines, found["unigram"]))


def main(
    families_: Annotated[str | None, typer.Option("--families", help="Model types, e.g. llama,qwen2.")] = None,
    ratios: RatiosOption = None,
    methods: Annotated[str | None, typer.Option(help="How units are chosen, fisher among them: fisher,flap.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Models a family.")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few and hardly trained models: to see that it works.")
    ] = False,
    processes: ProcessesOption = PROCESSES,
) -> None:
    """Compare the methods in several families of models, each trained here."""
    with one_line_errors():
        changed: dict[str, Any] = {"seeds": seeds}
        if ratios is not None:
            changed["ratios"] = numbers("--ratios", ratios)
        for name, given in (("families", families_), ("methods", methods)):
            if given is not None:
                changed[name] = names(given)
    run(families, changed, quick, processes)


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        typer.run(main)
