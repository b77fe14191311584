"""`python -m benchmarks [NAME ...]`: measure and write reports/bench/*.json."""

from typing import Annotated

import torch
import typer

from benchmarks import divergence, growth, saliency, surgery
from benchmarks.common import model_directory, write
from nirvana.errors import InputError

_BENCHMARKS = {
    "saliency": saliency.measure,
    "divergence": divergence.measure,
    "surgery": surgery.measure,
    "growth": growth.measure,
}


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help=f"Some of: {', '.join(_BENCHMARKS)}. All by default.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each way; the median counts.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Intra-op threads.")] = 2,
) -> None:
    """Measure speed and memory against the naive way, alternating in one run."""
    unknown = sorted(set(names or []) - set(_BENCHMARKS))
    if unknown:
        raise InputError(f"expected some of {', '.join(_BENCHMARKS)}, got {', '.join(unknown)}; correct the names")
    torch.set_num_threads(threads)
    model = model_directory()
    holds = [write(name, _BENCHMARKS[name](model, repeats)) for name in names or _BENCHMARKS]
    if not all(holds):
        raise typer.Exit(1)


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
