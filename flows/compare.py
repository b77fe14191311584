"""`python -m flows.compare`: NIRVANA and its rivals under one protocol.

Prunes the model of params.yaml by every method, at every ratio, with and without compensation; ends in a table and a
picture. A run that was stopped goes on where it was, and asks for no backward pass twice.
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
    JudgeOption,
    ModelOption,
    RatiosOption,
    SelfGeneratedOption,
    ThreadsOption,
    TokensOption,
    names,
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
from nirvana.errors import InputError

PICTURE = PICTURES / "compare.png"


@task
def measure(on: Subject, settings: Any) -> list[dict[str, Any]]:
    """Prune and judge."""
    from studies.compare import study

    return study.measure(study.Comparison(on.model, on.texts), settings)


@task
def report(lines: list[Any]) -> list[Path]:
    """Write table and picture."""
    from studies.compare.leaderboard import write_leaderboard
    from studies.compare.plot import draw

    return [*draw(lines, PICTURE), write_leaderboard(lines, PICTURE.with_suffix(".csv"))]


@study
def compare(asked: Asked, changed: dict[str, Any]) -> Outcome:
    """Compare methods, each at the same ratios on the same text.

    Args:
        asked: What the command line says.
        changed: Fields of `studies.compare.study.Settings` that are not the default.
    """
    set_environment(asked)
    from studies.compare.leaderboard import leaderboard, series, shown, verdict
    from studies.compare.study import Settings

    settings = _checked(replace(Settings(), **changed))
    on = subject(asked)
    reference = _reference(settings)
    lines = leaderboard(measure(on, settings), reference)
    conclusion = verdict(lines, reference)
    files = report(lines)
    run_id = record("compare", asdict(settings) | text_parameters(on.texts), series(lines), files, conclusion)
    title = "Methods by ratio and perplexity; loss in nats a token, with its 95 % interval"
    notes = [fitted_on(on.texts, asked)]
    notes += ["*  more than 0.5 point off the budget"] if any(line.off_budget for line in lines) else []
    return Outcome([as_table(title, shown(lines, reference), left=(1,))], conclusion, files, run_id, notes)


def _reference(settings: Any) -> tuple[str, str]:
    """Return the method that the others are compared with: ours if it takes part, else the first that is asked for."""
    from studies.comparison import BEST

    if BEST[0] in settings.methods:
        return BEST
    return settings.methods[0], next(cell[2] for cell in settings.cells())


def _checked(settings: Any) -> Any:
    from studies.methods import NAMES

    methods = NAMES if settings.methods == ("all",) else settings.methods
    unknown = [name for name in methods if name not in NAMES]
    if unknown:
        raise InputError(f"--methods: expected all or some of {','.join(NAMES)}, got {','.join(unknown)}; correct them")
    return replace(settings, methods=methods)


def main(
    ratios: RatiosOption = None,
    methods: Annotated[str | None, typer.Option(help="Methods, e.g. nirvana,fisher,flap; or all.")] = None,
    ids: IdsOption = None,
    judge: JudgeOption = None,
    model: ModelOption = None,
    tokens: TokensOption = TOKENS,
    compensation_sequences: CompensationSequencesOption = COMPENSATION_SEQUENCES,
    self_generated: SelfGeneratedOption = SELF_GENERATED,
    seeds: Annotated[int, typer.Option(min=1, help="Of the methods that draw something.")] = 1,
    threads: ThreadsOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Three methods, one ratio, 2,048 tokens: to see that it works.")
    ] = False,
) -> None:
    """Compare NIRVANA and its rivals under one protocol."""
    with one_line_errors():
        asked = Asked.of(
            ids,
            model,
            tokens,
            threads,
            quick,
            judge,
            compensation_sequences=compensation_sequences,
            self_generated=self_generated,
        )
        changed: dict[str, Any] = {"seeds": seeds}
        if quick:
            changed |= {"ratios": (0.4,), "methods": ("nirvana", "fisher", "flap")}
        if ratios is not None:
            changed["ratios"] = numbers("--ratios", ratios)
        if methods is not None:
            changed["methods"] = names(methods)
    run(compare, asked, changed)


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        typer.run(main)
