"""Step: speed, memory and size of the pruned checkpoint (recovered, if asked for) beside the dense model."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from nirvana.benchmark import Workload, benchmark
from nirvana.device import resolve_device
from nirvana.files import write_json
from tasks.evaluation.evaluated_checkpoint import judged_checkpoint

if TYPE_CHECKING:
    from tasks.params import Params

_LOG = logging.getLogger(__name__)


def run(params: "Params", inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> None:
    """Write both models' figures, their ratios and floors, and say so if pruning made nothing faster."""
    device = resolve_device(params.runtime.device)
    with judged_checkpoint(inputs["checkpoint"], inputs["recovered"]) as checkpoint:
        result = benchmark(inputs["model"], checkpoint, Workload(**asdict(params.benchmark)), device)
    if result["warning"]:
        _LOG.warning("%s", result["warning"])
    write_json(outputs["benchmark"], result)
