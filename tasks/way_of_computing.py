"""What `runtime.execution` and `runtime.memory` come to for a step that walks the model."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nirvana.estimate import Workload, choose
from nirvana.walk import Execution, Memory

if TYPE_CHECKING:
    from tasks.params import Params

_LOG = logging.getLogger(__name__)


def chosen_way(
    params: "Params", model: Path, ids: Sequence[Tensor], device: torch.device, **more: Any
) -> tuple[Execution, Memory]:
    """Settle `auto` by the estimate for these token ids; the results are the same either way.

    Args:
        params: Reads `runtime`.
        model: The dense model's directory.
        ids: Token ids a stack, `[..., sequences, tokens]`.
        device: What `runtime.device` stands for here.
        more: What else the step is asked to do, as in `nirvana.estimate.Workload`.
    """
    runtime = params.runtime
    work = Workload(
        sequences=ids[0].shape[-2],
        sequence_length=max(part.shape[-1] for part in ids),
        workers=runtime.workers if runtime.scheduler is None else 1,
        **more,
    )
    execution, memory = choose(model, work, device, runtime.execution, runtime.memory)
    _LOG.info("weights %s, memory %s", execution, memory)
    return execution, memory
