"""Step: quality of the dense model, on held-out text and on lm-eval's tasks."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.evaluation.quality import evaluate_checkpoint

if TYPE_CHECKING:
    from tasks.params import Params


def run(params: "Params", inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> None:
    """Write token perplexity and one metric a task, and beside it lm-eval's own results."""
    evaluate_checkpoint(
        params, inputs["model"], inputs["evaluation_data"], outputs["evaluation_dense"], outputs["lm_eval_dense"]
    )
