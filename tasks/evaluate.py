"""Step: quality of the pruned checkpoint (recovered, if asked for), on held-out text and on lm-eval's tasks."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.evaluation.evaluated_checkpoint import judged_checkpoint
from tasks.evaluation.quality import evaluate_checkpoint

if TYPE_CHECKING:
    from tasks.params import Params


def run(params: "Params", inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> None:
    """Write token perplexity and one metric a task, and beside it lm-eval's own results."""
    with judged_checkpoint(inputs["checkpoint"], inputs["recovered"]) as checkpoint:
        evaluate_checkpoint(params, checkpoint, inputs["evaluation_data"], outputs["evaluation"], outputs["lm_eval"])
