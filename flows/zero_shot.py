"""`python -m flows.zero_shot`: how much zero-shot accuracy does each method lose?

Prunes the model of params.yaml by every method and asks each model for last words and plausible continuations, made
from the corpus's evaluation split and, with --text, from another text. A run that was stopped goes on where it was.
"""

from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from flows.options import (
    COMPENSATION_SEQUENCES,
    SELF_GENERATED,
    CompensationSequencesOption,
    CorpusOption,
    IdsOption,
    ModelOption,
    RatiosOption,
    SelfGeneratedOption,
    ThreadsOption,
    WaysOption,
    numbers,
    ways,
)
from flows.outcome import Outcome, as_table
from flows.study import (
    PICTURES,
    Asked,
    Subject,
    bring,
    fitted_on,
    one_line_errors,
    read_texts,
    record,
    run,
    set_environment,
    study,
    task,
    text_parameters,
)
from nirvana.errors import InputError
from tasks.registry import paths

PICTURE = PICTURES / "zero_shot.png"
ITEMS, QUICK_ITEMS = 1000, 60
QUICK = {"ratios": (0.4,), "ways": (("nirvana", "none"), ("fisher", "least_squares"))}
_NO_TOKENS = 2
"""Evaluation tokens, which are read with the other texts but judge nothing here: the fewest there can be."""
_READ = ("calibration", "compensation")


class Judged(NamedTuple):
    """What the items are made from: `corpus`, a directory or the pipeline's, `text`, if any; and how many."""

    corpus: Path | None
    text: Path | None
    items: int


@task
def prepare(asked: Asked, corpus: Path | None) -> dict[str, Path]:
    """Have DVC bring up to date what is not given: model, corpus, and the pool unless ids or a corpus are."""
    needed = {"fetch_model": asked.model, "fetch_corpus": corpus, "sample_pool": asked.ids or corpus}
    bring(step for step, given in needed.items() if given is None)
    files = paths("fetch_model")[1] | paths("fetch_corpus")[1] | paths("sample_pool")[1]
    given = {"model": asked.model, "corpus": corpus}
    return files | {name: path for name, path in given.items() if path is not None}


@task
def make_items(on: Subject, corpus: Path, judged: Judged) -> list[Any]:
    """Make the items, apart from what is calibrated on."""
    from studies.zero_shot.items import item_sets

    return item_sets(on.model, on.texts, corpus, judged.items, judged.text)


@task
def measure(on: Subject, sets: list[Any], settings: Any) -> list[dict[str, Any]]:
    """Prune and ask."""
    from studies.zero_shot import study

    return study.measure(study.ZeroShot(on.model, on.texts), sets, settings)


@task
def report(lines: list[Any]) -> list[Path]:
    """Write table and picture."""
    from studies.zero_shot.plot import draw
    from studies.zero_shot.summary import write_table

    return [*draw(lines, PICTURE), write_table(lines, PICTURE.with_suffix(".csv"))]


@study
def zero_shot(asked: Asked, judged: Judged, changed: dict[str, Any]) -> Outcome:
    """Compare the accuracy that methods lose, each at the same ratios on the same items.

    Args:
        asked: What the command line says.
        judged: What the items are made from.
        changed: Fields of `studies.zero_shot.study.Settings` that are not the default.
    """
    set_environment(asked)
    from studies.zero_shot import summary
    from studies.zero_shot.study import Settings

    settings = _checked(replace(Settings(), **changed))
    files = prepare(asked, judged.corpus)
    on = Subject(files["model"], read_texts(asked, files))
    sets = make_items(on, files["corpus"], judged)
    lines = summary.lines(measure(on, sets, settings))
    conclusion = summary.verdict(lines)
    written = report(lines)
    read = {name: {each: of[each] for each in _READ} for name, of in text_parameters(on.texts).items()}
    parameters = asdict(settings) | read | {"items": {f"{x.text} {x.kind}": f"{len(x.items)} {x.digest}" for x in sets}}
    run_id = record("zero_shot", parameters, summary.series(lines), written, conclusion)
    tables = [as_table(title, rows, left=(1,)) for title, rows in summary.tables(lines).items()]
    seconds = [line.seconds_per_item for line in lines if line.kind == summary.ALL]
    notes = [fitted_on(on.texts, asked)]
    notes += [f"{sum(seconds) / len(seconds):.2f} s an item and model"] if seconds else []
    return Outcome(tables, conclusion, written, run_id, notes)


def _checked(settings: Any) -> Any:
    from studies.comparison import COMPENSATIONS
    from studies.methods import METHODS

    if odd := [way for way in settings.ways if way[0] not in METHODS or way[1] not in COMPENSATIONS]:
        raise InputError(
            f"--methods: expected some of {','.join(METHODS)}, each maybe with +bias or +least_squares, got "
            f"{'+'.join(odd[0])}; correct it"
        )
    return settings


def main(
    ratios: RatiosOption = None,
    methods: WaysOption = None,
    items: Annotated[int, typer.Option(min=10, help="Items a text, both kinds together.")] = ITEMS,
    text: Annotated[
        Path | None,
        typer.Option(help="Other text to ask about as well: .txt, .jsonl with a column text, or a directory of such."),
    ] = None,
    corpus: CorpusOption = None,
    ids: IdsOption = None,
    model: ModelOption = None,
    compensation_sequences: CompensationSequencesOption = COMPENSATION_SEQUENCES,
    self_generated: SelfGeneratedOption = SELF_GENERATED,
    threads: ThreadsOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Two methods, one ratio, 60 items: to see that it works.")
    ] = False,
) -> None:
    """Measure how much zero-shot accuracy each method loses."""
    with one_line_errors():
        asked = Asked.of(
            ids,
            model,
            _NO_TOKENS,
            threads,
            quick,
            compensation_sequences=compensation_sequences,
            self_generated=self_generated,
        )
        changed: dict[str, Any] = dict(QUICK) if quick else {}
        if ratios is not None:
            changed["ratios"] = numbers("--ratios", ratios)
        if methods is not None:
            changed["ways"] = ways(methods)
    corpus, text = (each.resolve() if each else None for each in (corpus, text))
    run(zero_shot, asked, Judged(corpus, text, min(items, QUICK_ITEMS) if quick else items), changed)


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        typer.run(main)
