"""`python -m flows.calibration_study`: how much does the calibration text decide?

Draws candidate batches from the corpus of params.yaml as the pipeline does, prunes by each, and looks whether KL on the
held-out batch chooses the one that has the least perplexity; then averages, other amounts, other lengths and, with
--ids, text of another kind. A run that was stopped goes on where it was.
"""

from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from flows.options import TOKENS, CorpusOption, ModelOption, ThreadsOption, TokensOption
from flows.outcome import Outcome, as_table
from flows.study import PICTURES, Asked, bring, one_line_errors, record, run, set_environment, study, task
from nirvana.errors import InputError
from tasks.params import load_params
from tasks.registry import paths

PICTURE = PICTURES / "calibration_study.png"
QUICK = {
    "candidates": 6,
    "averaged": (2, 6),
    "groups": 2,
    "counts": (4, 8, 16),
    "length_tokens": 1024,
    "draws": 2,
    "other_candidates": 3,
}


class Subject(NamedTuple):
    """What is pruned, and `Source`s of what it is calibrated on and judged by."""

    model: Path
    corpus: Any
    other: Any


@task
def prepare(asked: Asked, corpus: Path | None) -> tuple[Path, Path]:
    """Have DVC bring model and corpus up to date unless they are given; return where they are."""
    given = {"fetch_model": asked.model, "fetch_corpus": corpus}
    bring(step for step, path in given.items() if path is None)
    return asked.model or paths("fetch_model")[1]["model"], corpus or paths("fetch_corpus")[1]["corpus"]


@task
def read_sources(asked: Asked, model: Path, corpus: Path) -> Subject:
    """Read what is drawn from."""
    from studies.calibration_study.texts import corpus_source, ids_source

    other = ids_source(asked.ids, asked.tokens) if asked.ids else None
    return Subject(model, corpus_source(load_params(), model, corpus, asked.tokens), other)


@task
def measure(on: Subject, settings: Any) -> list[dict[str, Any]]:
    """Score, prune and judge."""
    from studies.calibration_study import study

    return study.measure(study.CalibrationStudy(on.model, settings.method, settings.ratio), *on[1:], settings)


@task
def report(rows: list[dict[str, Any]], lines: list[Any], pairs: list[Any]) -> list[Path]:
    """Write tables and picture."""
    from studies.calibration_study.plot import draw
    from studies.calibration_study.texts import CORPUS
    from studies.calibration_study.words import write_tables

    return [*draw(rows, CORPUS, PICTURE), *write_tables(rows, lines, pairs, PICTURE.with_suffix(".csv"))]


@study
def calibration_study(asked: Asked, corpus: Path | None, changed: dict[str, Any]) -> Outcome:
    """Measure what the choice, the amount, the length and the kind of calibration text is worth.

    Args:
        asked: What the command line says; `ids`: another text.
        corpus: Directory of documents.jsonl; None: the pipeline's.
        changed: Fields of `studies.calibration_study.study.Settings` that are not the default.
    """
    set_environment(asked)
    from studies.calibration_study import words
    from studies.calibration_study.study import Settings
    from studies.calibration_study.summary import lines, matches

    settings = replace(Settings(), **changed)
    on = read_sources(asked, *prepare(asked, corpus))
    rows = measure(on, settings)
    found, pairs = lines(rows, on.corpus.name, load_params().calibration.pool_size), matches(rows)
    conclusion = words.verdict(rows, on.corpus.name, found, pairs)
    files = report(rows, found, pairs)
    run_id = record("calibration", _parameters(settings, on), words.series(rows), files, conclusion)
    title = f"{settings.method} at ratio {settings.ratio:g}, calibrated and judged on the corpus"
    tables = [as_table(title, words.line_table(found))]
    if pairs:
        title = f"Candidates of {settings.sequences} × {settings.length} tokens, in and out of domain"
        tables.append(as_table(title, words.match_table(pairs), left=(0, 1)))
    notes = ["n plans, ± deviation between them; gain in nats a token, with its 95 % interval over windows"]
    return Outcome(tables, conclusion, files, run_id, notes)


def _parameters(settings: Any, on: Subject) -> dict[str, Any]:
    texts = {
        each.name: {"heldout": each.heldout.digest, "evaluation": each.evaluation.digest} for each in on[1:] if each
    }
    return asdict(settings) | {"text": texts, "evaluation_windows_and_tokens": list(on.corpus.evaluation.ids.shape)}


def _checked(method: str, ratio: float, candidates: int | None) -> dict[str, Any]:
    if method not in ("nirvana", "fisher"):
        raise InputError(f"--method: expected nirvana or fisher, got {method}; correct it")
    if not 0 < ratio < 1:
        raise InputError(f"--ratio: expected a number between 0 and 1 such as 0.4, got {ratio:g}; correct it")
    changed: dict[str, Any] = {"method": method, "ratio": ratio}
    return changed if candidates is None else changed | {"candidates": candidates}


def main(
    method: Annotated[str, typer.Option(help="nirvana or fisher.")] = "nirvana",
    ratio: Annotated[float, typer.Option(help="Pruning ratio.")] = 0.4,
    candidates: Annotated[int | None, typer.Option(min=4, help="Candidate batches of 8 x 128 tokens; 16.")] = None,
    ids: Annotated[
        Path | None,
        typer.Option(help="Directory of JSON files of token ids: another text, to calibrate on and judge by as well."),
    ] = None,
    corpus: CorpusOption = None,
    model: ModelOption = None,
    tokens: TokensOption = TOKENS,
    threads: ThreadsOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few and small batches, 2,048 tokens: to see that it works.")
    ] = False,
) -> None:
    """Measure how much the calibration text decides."""
    with one_line_errors():
        asked = Asked.of(ids, model, tokens, threads, quick)
        changed = (QUICK if quick else {}) | _checked(method, ratio, candidates)
    run(calibration_study, asked, corpus.resolve() if corpus else None, changed)


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        typer.run(main)
