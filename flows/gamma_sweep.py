"""`python -m flows.gamma_sweep`: which gamma is best, and would held-out KL find it?

Prunes the model of params.yaml by the published saliency at several gammas, rule exact, and by Fisher's joint ranking,
which has none. A run that was stopped goes on where it was.
"""

from contextlib import suppress
from typing import Annotated, Any

import typer

from flows.options import TOKENS, IdsOption, ModelOption, RatiosOption, ThreadsOption, TokensOption, numbers
from flows.outcome import Outcome
from flows.study import Asked, one_line_errors, run, study
from flows.sweep import sweep

QUICK: dict[str, Any] = {"gammas": (1.0, 2.0, 5.0), "ratios": (0.4,)}


@study
def gamma_sweep(asked: Asked, changed: dict[str, Any]) -> Outcome:
    """Sweep gamma, the MLP rate divided by the attention rate.

    Args:
        asked: What the command line says.
        changed: Fields of `studies.sweep.gamma_sweep.Settings` that are not the default.
    """
    return sweep("gamma_sweep", asked, changed)


def main(
    ratios: RatiosOption = None,
    gammas: Annotated[str | None, typer.Option(help="MLP rate / attention rate, e.g. 1,2,5; 3.36 is added.")] = None,
    ids: IdsOption = None,
    model: ModelOption = None,
    tokens: TokensOption = TOKENS,
    threads: ThreadsOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Four gammas, one ratio, 2,048 tokens: to see that it works.")
    ] = False,
) -> None:
    """Sweep gamma, the MLP rate divided by the attention rate."""
    with one_line_errors():
        asked = Asked.of(ids, model, tokens, threads, quick)
        changed = dict(QUICK) if quick else {}
        if ratios is not None:
            changed["ratios"] = numbers("--ratios", ratios)
        if gammas is not None:
            changed["gammas"] = numbers("--gammas", gammas, below=1000)
    run(gamma_sweep, asked, changed)


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        typer.run(main)
