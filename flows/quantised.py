"""`python -m flows.quantised`: pruned, then int8 or int4: does the damage add up?

Prunes the model of params.yaml, rounds what is left, and compares perplexity and bytes with the dense model rounded
alike. A run that was stopped goes on where it was.
"""

from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.options import (
    COMPENSATION_SEQUENCES,
    SELF_GENERATED,
    TOKENS,
    CompensationSequencesOption,
    IdsOption,
    ModelOption,
    RatiosOption,
    SelfGeneratedOption,
    ThreadsOption,
    TokensOption,
    numbers,
)
from flows.outcome import Outcome, as_table
from flows.study import (
    PICTURES,
    Asked,
    Subject,
    fitted_on,
    one_line_errors,
    record,
    run,
    set_environment,
    study,
    subject,
    task,
    text_parameters,
)

PICTURE = PICTURES / "quantised.png"
QUICK = {"ratios": (0.4,)}


@task
def measure(on: Subject, settings: Any) -> list[dict[str, Any]]:
    """Prune, round and judge."""
    from studies.quantised import study

    return study.measure(study.Quantised(on.model, on.texts), settings)


@task
def report(lines: list[Any], sums: list[Any]) -> list[Path]:
    """Write tables and picture."""
    from studies.quantised.plot import draw
    from studies.quantised.summary import write_tables

    return [*draw(lines, sums, PICTURE), *write_tables(lines, sums, PICTURE.with_suffix(".csv"))]


@study
def quantised(asked: Asked, changed: dict[str, Any]) -> Outcome:
    """Compare pruning, quantising and both.

    Args:
        asked: What the command line says.
        changed: Fields of `studies.quantised.study.Settings` that are not the default.
    """
    set_environment(asked)
    from studies.quantised import summary
    from studies.quantised.study import Settings

    settings = replace(Settings(), **changed)
    on = subject(asked)
    rows = measure(on, settings)
    lines, sums = summary.cells(rows), summary.sums(rows)
    conclusion = summary.verdict(lines, sums)
    files = report(lines, sums)
    parameters = asdict(settings) | text_parameters(on.texts)
    run_id = record("quantised", parameters, summary.series(lines, sums), files, conclusion)
    tables = [
        as_table("Weights in few bits, simulated; loss in nats a token", summary.cell_table(lines)),
        as_table("Does the damage add up? Loss above the dense model", summary.sum_table(sums)),
    ]
    notes = [
        "*  no other has as little perplexity in as few bytes; what is not in few bits counts as it is stored",
        f"{summary.LEGEND}; {fitted_on(on.texts, asked)}",
    ]
    return Outcome(tables, conclusion, files, run_id, notes)


def main(
    ratios: RatiosOption = None,
    ids: IdsOption = None,
    model: ModelOption = None,
    tokens: TokensOption = TOKENS,
    compensation_sequences: CompensationSequencesOption = COMPENSATION_SEQUENCES,
    self_generated: SelfGeneratedOption = SELF_GENERATED,
    threads: ThreadsOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="One ratio, 2,048 tokens: to see that it works.")] = False,
) -> None:
    """Compare pruning, quantising to int8 and int4, and both."""
    with one_line_errors():
        asked = Asked.of(
            ids,
            model,
            tokens,
            threads,
            quick,
            compensation_sequences=compensation_sequences,
            self_generated=self_generated,
        )
        changed: dict[str, Any] = dict(QUICK) if quick else {}
        if ratios is not None:
            changed["ratios"] = numbers("--ratios", ratios)
    run(quantised, asked, changed)


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        typer.run(main)
