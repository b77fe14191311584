"""`python -m flows.modules`: may MLP, attention or both lose weights?

Prunes the model of params.yaml in one module only, and in both, at equal ratios of all block weights. A run that was
stopped goes on where it was.
"""

from contextlib import suppress
from typing import Annotated, Any

import typer

from flows.options import TOKENS, IdsOption, ModelOption, RatiosOption, ThreadsOption, TokensOption, names, numbers
from flows.outcome import Outcome
from flows.study import Asked, one_line_errors, run, study
from flows.sweep import sweep

QUICK: dict[str, Any] = {"ratios": (0.1, 0.2)}


@study
def modules(asked: Asked, changed: dict[str, Any]) -> Outcome:
    """Compare pruning MLP only, attention only and both.

    Args:
        asked: What the command line says.
        changed: Fields of `studies.sweep.modules.Settings` that are not the default.
    """
    return sweep("modules", asked, changed)


def main(
    ratios: RatiosOption = None,
    methods: Annotated[str | None, typer.Option(help="How units are chosen, e.g. nirvana,fisher.")] = None,
    ids: IdsOption = None,
    model: ModelOption = None,
    tokens: TokensOption = TOKENS,
    threads: ThreadsOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two ratios, 2,048 tokens: to see that it works.")] = False,
) -> None:
    """Compare pruning MLP only, attention only and both."""
    with one_line_errors():
        asked = Asked.of(ids, model, tokens, threads, quick)
        changed = dict(QUICK) if quick else {}
        if ratios is not None:
            changed["ratios"] = numbers("--ratios", ratios)
        if methods is not None:
            changed["methods"] = names(methods)
    run(modules, asked, changed)


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        typer.run(main)
