"""Read unit saliency back, average the best candidates', and allocate from it as the parameters say."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from nirvana.allocation import Keep, allocate
from nirvana.architectures.architecture import Architecture
from nirvana.checkpoint.config import loadable_kv_groups
from nirvana.methods.registry import METHODS

if TYPE_CHECKING:
    from tasks.params import Params


def candidate_files(directory: Path) -> list[Path]:
    """Return the unit saliency files in candidate order."""
    return sorted(directory.glob("candidate_*.safetensors"))


def read_unit_saliency(file: Path) -> dict[str, NDArray[np.float32]]:
    """Return one candidate's unit saliency by site name."""
    return load_file(file)


def best_candidates(scores: Sequence[float], count: int) -> list[int]:
    """Return the `count` candidates of smallest KL, in their own order."""
    return sorted(np.argsort(np.asarray(scores), kind="stable")[:count].tolist())


def averaged_saliency(files: Sequence[Path], scores: Sequence[float], count: int) -> dict[str, NDArray[np.float32]]:
    """Return the mean unit saliency of the `count` best candidates; of one, its own values."""
    each = [read_unit_saliency(files[index]) for index in best_candidates(scores, count)]
    if count == 1:
        return each[0]
    means = {name: np.stack([values[name] for values in each]).mean(axis=0, dtype=np.float64) for name in each[0]}
    return {name: values.astype(np.float32) for name, values in means.items()}


def allocate_as_asked(architecture: Architecture, saliency: dict[str, NDArray[np.float32]], params: "Params") -> Keep:
    """Return the kept units for the sections `allocation` and `saliency` of params.yaml."""
    return allocate(
        architecture.sites(),
        saliency,
        params.allocation,
        functools.partial(loadable_kv_groups, architecture),
        per_weight=METHODS[params.saliency.method].per_weight,
    )
