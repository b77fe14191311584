"""`python -m benchmarks.quality`: how much of the model our best method keeps, against the published one's.

Perplexity of mask Fisher with least squares divided by that of NIRVANA as its authors' code counts, both measured here,
on the same ids; as in preset `best`, compensation reads text of the model's own besides. Rows are kept in the studies'
cache: a run that was stopped goes on where it was.
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import Measurement, model_directory, write
from nirvana.errors import InputError

REFERENCE_IDS = Path("../shared/oracle")
RIDGE = 0.3
LIMITS = {0.2: 0.72, 0.4: 0.40, 0.5: 0.34}
"""Perplexity of ours / the published method's, by ratio."""


def measure(model: Path, ids: Path, limits: dict[float, float] | None = None) -> list[Measurement]:
    """Return perplexities and their quotients.

    Args:
        model: The dense model.
        ids: Directory of token ids, see `studies.texts.texts_of_ids`; compensation has all of them that
            calibration may use, and what the model writes.
        limits: By ratio.
    """
    import numpy as np

    from nirvana.presets import PRESETS
    from studies.comparison import Comparison
    from studies.texts import texts_of_ids, with_generated
    from studies.variants import Variant

    texts = with_generated(texts_of_ids(ids), model, PRESETS["best"]["compensation.self_generated"])
    comparison = Comparison(model, texts, ridge=RIDGE)

    def perplexity(row: dict) -> float:
        return float(np.exp(np.mean(row["losses"])))

    found = [Measurement("perplexity, dense", perplexity(comparison.dense()), "")]
    for ratio, limit in (LIMITS if limits is None else limits).items():
        published = comparison.row(Variant("nirvana", ratio, rule="published"))
        ours = comparison.row(Variant("fisher", ratio, "least_squares"))
        values = [perplexity(row) for row in (published, ours)]
        found += [
            Measurement(f"ratio {ratio:g}: achieved by the published rule", published["achieved_ratio"], ""),
            Measurement(f"ratio {ratio:g}: achieved by ours", ours["achieved_ratio"], "", least=ratio - 0.005),
            Measurement(f"ratio {ratio:g}: perplexity, published", values[0], ""),
            Measurement(f"ratio {ratio:g}: perplexity, ours", values[1], ""),
            Measurement(f"ratio {ratio:g}: perplexity, ours / published", values[1] / values[0], "x", limit=limit),
        ]
    return found


def main(
    ids: Annotated[
        Path | None,
        typer.Option(
            help="Directory of calibration_ids.json, calibration_extra_ids.json, heldout_ids.json, evaluation_ids.json."
        ),
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Model directory; the pipeline's by default.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Intra-op threads.")] = 2,
) -> None:
    """Hold our best method's perplexity against the published one's."""
    import torch

    torch.set_num_threads(threads)
    if ids is None and not REFERENCE_IDS.is_dir():
        raise InputError(
            "quality: expected token ids to judge on, got none; give a directory of calibration_ids.json, "
            "calibration_extra_ids.json, heldout_ids.json and evaluation_ids.json: "
            "python -m benchmarks.quality --ids DIRECTORY"
        )
    if not write("quality", measure(model or model_directory(), ids or REFERENCE_IDS)):
        raise typer.Exit(1)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        typer.run(main)
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
