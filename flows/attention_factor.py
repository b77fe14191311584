"""`python -m flows.attention_factor`: how often should a KV group count in the one list of mask Fisher?

Prunes the model of params.yaml by mask Fisher and least squares at several factors. A run that was stopped goes on
where it was, and asks for no backward pass twice.
"""

from contextlib import suppress
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
from flows.outcome import Outcome
from flows.study import Asked, one_line_errors, run, study
from flows.sweep import sweep

QUICK: dict[str, Any] = {"factors": (1.0, 4.0)}


@study
def attention_factor(asked: Asked, changed: dict[str, Any]) -> Outcome:
    """Sweep the factor that a KV group's saliency is multiplied by.

    Args:
        asked: What the command line says.
        changed: Fields of `studies.sweep.attention_factor.Settings` that are not the default.
    """
    return sweep("attention_factor", asked, changed)


def main(
    ratios: RatiosOption = None,
    factors: Annotated[str | None, typer.Option(help="E.g. 0.5,1,4; the default 2 is added.")] = None,
    ids: IdsOption = None,
    model: ModelOption = None,
    tokens: TokensOption = TOKENS,
    compensation_sequences: CompensationSequencesOption = COMPENSATION_SEQUENCES,
    self_generated: SelfGeneratedOption = SELF_GENERATED,
    threads: ThreadsOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="Three factors, 2,048 tokens: to see that it works.")] = False,
) -> None:
    """Sweep how often a KV group counts in the ranking of mask Fisher."""
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
        changed = dict(QUICK) if quick else {}
        if ratios is not None:
            changed["ratios"] = numbers("--ratios", ratios)
        if factors is not None:
            changed["factors"] = numbers("--factors", factors, below=1000)
    run(attention_factor, asked, changed)


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        typer.run(main)
