"""`python -m flows.alignment`: what do multiples of 1, 8, 64 or 128 neurons cost and gain?

Prunes the model of params.yaml with several roundings, judges each, and times its checkpoint in turns with the dense
model. A run that was stopped goes on where it was.
"""

from contextlib import suppress
from typing import Annotated, Any

import typer

from flows.options import TOKENS, IdsOption, ModelOption, RatiosOption, ThreadsOption, TokensOption, numbers
from flows.outcome import Outcome
from flows.study import Asked, one_line_errors, run, study
from flows.sweep import sweep
from nirvana.errors import InputError

QUICK: dict[str, Any] = {"ratios": (0.4,), "round_to": (1, 8, 64)}


@study
def alignment(asked: Asked, changed: dict[str, Any]) -> Outcome:
    """Compare roundings of the neurons that each layer keeps.

    Args:
        asked: What the command line says.
        changed: Fields of `studies.sweep.alignment.Settings` that are not the default.
    """
    return sweep("alignment", asked, changed)


def _multiples(text: str) -> tuple[int, ...]:
    if not all(part.strip().isdigit() and int(part) for part in text.split(",")):
        raise InputError(f"--round-to: expected whole numbers above 0 such as 1,8,64, got {text}; correct them")
    return tuple(int(part) for part in text.split(","))


def main(
    ratios: RatiosOption = None,
    round_to: Annotated[str | None, typer.Option(help="Multiples of kept neurons, e.g. 1,8,64.")] = None,
    method: Annotated[str | None, typer.Option(help="How units are chosen, e.g. nirvana or fisher.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Timed rounds; 9 by default.")] = None,
    ids: IdsOption = None,
    model: ModelOption = None,
    tokens: TokensOption = TOKENS,
    threads: ThreadsOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Three roundings, one ratio, 2,048 tokens: to see that it works.")
    ] = False,
) -> None:
    """Compare roundings of the neurons that each layer keeps."""
    with one_line_errors():
        asked = Asked.of(ids, model, tokens, threads, quick)
        changed = dict(QUICK) if quick else {}
        if ratios is not None:
            changed["ratios"] = numbers("--ratios", ratios)
        if round_to is not None:
            changed["round_to"] = _multiples(round_to)
        changed |= {name: value for name, value in (("method", method), ("repeats", repeats)) if value is not None}
    run(alignment, asked, changed)


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        typer.run(main)
