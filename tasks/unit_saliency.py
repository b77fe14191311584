"""Read unit saliency back, and allocate from it as the parameters say."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from nirvana.allocation import Keep, allocate
from nirvana.architectures.architecture import Architecture
from nirvana.checkpoint.config import loadable_kv_groups

if TYPE_CHECKING:
    from tasks.params import Allocation


def candidate_files(directory: Path) -> list[Path]:
    """Return the unit saliency files in candidate order."""
    return sorted(directory.glob("candidate_*.safetensors"))


def read_unit_saliency(file: Path) -> dict[str, NDArray[np.float32]]:
    """Return one candidate's unit saliency by site name."""
    return load_file(file)


def allocate_as_asked(
    architecture: Architecture, saliency: dict[str, NDArray[np.float32]], allocation: "Allocation"
) -> Keep:
    """Return the kept units for the `allocation` section of params.yaml."""
    return allocate(
        architecture.sites(),
        saliency,
        pruning_ratio=allocation.pruning_ratio,
        gamma=allocation.gamma,
        round_to=allocation.round_to,
        rule=allocation.rule,
        scope=allocation.scope,
        loadable_kv_groups=functools.partial(loadable_kv_groups, architecture),
    )
