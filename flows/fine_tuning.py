"""`python -m flows.fine_tuning`: does a pruned model still learn?

Prunes the model of params.yaml by every method, fine-tunes each on the same tokens in the same order, and compares
them before and after. A run that was stopped goes on where it was: finished models are known, one under way goes on
from its last point of the curve.
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
    SelfGeneratedOption,
    ThreadsOption,
    TokensOption,
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
    record,
    run,
    set_environment,
    study,
    subject,
    task,
    text_parameters,
)
from nirvana.errors import InputError
from tasks.params import load_params
from tasks.registry import paths

PICTURE = PICTURES / "fine_tuning.png"
QUICK_TRAINING_TOKENS = 4096
QUICK = {"ways": (("nirvana", "none"), ("fisher", "least_squares"))}


@task
def prepare_corpus(asked: Asked, corpus: Path | None) -> Path:
    """Have DVC bring up to date the corpus that is trained on, unless one is given; return where it is."""
    if corpus is None and asked.ids:  # else it is up to date by now: the other texts come from it
        bring(["fetch_corpus"])
    return corpus or paths("fetch_corpus")[1]["corpus"]


@task
def put_together(on: Subject, corpus: Path, recipe: Any, threads: int | None) -> Any:
    """Read what every model is trained on."""
    from nirvana.device import resolve_device
    from studies.fine_tuning import study as tuning
    from tasks.workers.child import fix_torch

    params = load_params()
    fix_torch(threads or params.compute.threads)
    training = tuning.read_training(params, on.model, corpus, recipe)
    return tuning.FineTuning(on.model, on.texts, training, recipe, device=resolve_device(params.runtime.device))


@task
def measure(on: Any, settings: Any) -> list[dict[str, Any]]:
    """Prune, fine-tune and judge."""
    from studies.fine_tuning import study as tuning

    return tuning.measure(on, settings)


@task
def report(dense: Any, lines: list[Any], reference: tuple[str, str]) -> list[Path]:
    """Write tables and picture."""
    from studies.fine_tuning.plot import draw
    from studies.fine_tuning.summary import write_tables

    return [*draw(dense, lines, reference, PICTURE), *write_tables(dense, lines, PICTURE.with_suffix(".csv"))]


@study
def fine_tuning(asked: Asked, corpus: Path | None, changed: dict[str, Any]) -> Outcome:
    """Fine-tune every method's pruned model alike.

    Args:
        asked: What the command line says.
        corpus: What is trained on, in place of the pipeline's.
        changed: Fields of `studies.fine_tuning.study.Settings` that are not the default.
    """
    set_environment(asked)
    from studies.fine_tuning import study as tuning
    from studies.fine_tuning import summary

    settings = replace(tuning.Settings(), **changed)
    tuning.check(settings)
    recipe = tuning.recipe_of(load_params().recovery, settings.tokens)
    together = put_together(subject(asked), prepare_corpus(asked, corpus), recipe, asked.threads)
    dense, lines = summary.summary(measure(together, settings), settings.reference)
    conclusion = summary.verdict(dense, lines, settings.reference)
    files = report(dense, lines, settings.reference)
    parameters = asdict(settings) | text_parameters(together.texts) | tuning.described(together)
    run_id = record("fine_tuning", parameters, summary.series(lines), files, conclusion)
    title = f"Loss in nats a token before and after {lines[0].tokens:,} tokens of LoRA, with 95 % intervals"
    tables = [as_table(title, summary.table(dense, lines, settings.reference))]
    return Outcome(tables, conclusion, files, run_id, _notes(asked, together.texts, corpus, lines))


def _notes(asked: Asked, texts: Any, corpus: Path | None, lines: list[Any]) -> list[str]:
    notes = [f"LS  output projections solved for by least squares; {fitted_on(texts, asked)}"]
    source = f"documents of {corpus}" if corpus else "the pipeline's corpus (corpus.source in params.yaml)"
    if asked.ids or corpus:
        notes.append(f"trained on {source}, pruned and judged on other text: a gain has to carry over")
    seconds = [line.seconds_a_step for line in lines if line.seconds_a_step]
    return notes + ([f"{sum(seconds) / len(seconds):.1f} s a step"] if seconds else [])


def _ratio(text: str) -> float:
    first, *others = numbers("--ratio", text)
    if others:
        raise InputError(f"--ratio: expected one number such as 0.4, got {text}; run once for each")
    return first


def main(
    methods: WaysOption = None,
    ratio: Annotated[str | None, typer.Option(help="Pruning ratio, 0.4 by default.")] = None,
    training_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that each model is trained on; 24,576 by default.")
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Directory with documents.jsonl to train on, in place of the pipeline's corpus.")
    ] = None,
    ids: IdsOption = None,
    model: ModelOption = None,
    tokens: TokensOption = TOKENS,
    compensation_sequences: CompensationSequencesOption = COMPENSATION_SEQUENCES,
    self_generated: SelfGeneratedOption = SELF_GENERATED,
    threads: ThreadsOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Two methods, 4,096 training tokens: to see that it works.")
    ] = False,
) -> None:
    """Measure what fine-tuning makes of each method's pruned model; training text is always a corpus's."""
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
        changed: dict[str, Any] = QUICK | {"tokens": QUICK_TRAINING_TOKENS} if quick else {}
        if methods is not None:
            changed["ways"] = ways(methods)
        if ratio is not None:
            changed["ratio"] = _ratio(ratio)
        if training_tokens is not None:
            changed["tokens"] = training_tokens
    run(fine_tuning, asked, corpus.resolve() if corpus else None, changed)


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        typer.run(main)
