"""What studies are asked on the command line: options that several share, and how their text is read."""

from pathlib import Path
from typing import Annotated

import typer

from nirvana.errors import InputError
from tasks.params import PRESETS

TOKENS = 4096
COMPENSATION_SEQUENCES, SELF_GENERATED = 160, PRESETS["best"]["compensation.self_generated"]

QUICK_TOKENS, QUICK_COMPENSATION_SEQUENCES, QUICK_SELF_GENERATED = 2048, 32, 24
_BEST = "fisher+least_squares"
"""What `best` stands for among methods."""

RatiosOption = Annotated[str | None, typer.Option(help="Pruning ratios, e.g. 0.2,0.4.")]
WaysOption = Annotated[str | None, typer.Option(help=f"Methods, e.g. nirvana,best,flap+bias; best is {_BEST}.")]
IdsOption = Annotated[
    Path | None, typer.Option(help="Directory of JSON files of token ids, in place of the pipeline's text.")
]
JudgeOption = Annotated[
    Path | None,
    typer.Option(help="Token ids (.json) or text (.txt, .jsonl) to judge on, in place of the evaluation split."),
]
CorpusOption = Annotated[
    Path | None, typer.Option(help="Directory with documents.jsonl, in place of the pipeline's corpus.")
]
ModelOption = Annotated[Path | None, typer.Option(help="Model directory, in place of the pipeline's.")]
TokensOption = Annotated[int, typer.Option(min=2, help="Evaluation tokens.")]
CompensationSequencesOption = Annotated[int, typer.Option(min=1, help="Sequences that compensation is fitted on.")]
SelfGeneratedOption = Annotated[int, typer.Option(min=0, help="More of them, which the dense model writes itself.")]
ProcessesOption = Annotated[int, typer.Option(min=1, help="Models worked on at a time.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Intra-op threads; params.yaml's by default.")]


def numbers(option: str, text: str, below: float = 1.0) -> tuple[float, ...]:
    """Read comma-separated numbers between 0 and `below`.

    Raises:
        InputError: If there are others.
    """
    try:
        values = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        values = ()
    if not values or not all(0 < value < below for value in values):
        raise InputError(
            f"{option}: expected numbers between 0 and {below:g} such as 0.2,0.4, got {text}; correct them"
        )
    return values


def names(text: str) -> tuple[str, ...]:
    """Read comma-separated names, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def ways(text: str) -> tuple[tuple[str, str], ...]:
    """Read methods, each maybe with what makes up for what it removes: `flap`, `flap+bias`, `best`."""
    parts = ((_BEST if name == "best" else name).partition("+") for name in names(text))
    return tuple(dict.fromkeys((method, compensation or "none") for method, _, compensation in parts))
