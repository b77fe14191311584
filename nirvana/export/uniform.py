"""`uniform`: the plan's settings allocated again with equal counts in every layer, so that stock classes load it.

Other units stay than in the checkpoint, cut from the dense model: what compensation solved for is not theirs and does
not come along.
"""

import functools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from nirvana.allocation import allocate
from nirvana.checkpoint.config import loadable_kv_groups
from nirvana.errors import InputError
from nirvana.export.hf import TOLERANCE, every_position, measure_in_transformers
from nirvana.export.source import Format, Options, Source
from nirvana.files import sha256_file
from nirvana.methods.registry import METHODS
from nirvana.plan import Plan
from nirvana.surgery import prune


def _prepare(source: Source, options: Options) -> None:
    if options.saliency is None:
        raise InputError(
            "uniform: expected the unit saliency that the plan was allocated from, got none; "
            "give --saliency FILE, e.g. artifacts/unit_saliency/candidate_003.safetensors"
        )


def _write(source: Source, options: Options, directory: Path) -> Plan:
    assert options.saliency is not None
    plan = _uniform_plan(source, _read_saliency(options.saliency), sha256_file(options.saliency))
    prune(source.model, plan, directory)
    if "auto_map" in json.loads((directory / "config.json").read_text(encoding="utf-8")):
        raise InputError(
            f"uniform: expected sizes that a stock {source.plan.model_type} configuration accepts, got none at this "
            "ratio; prune to another ratio"
        )
    return plan


def _uniform_plan(source: Source, saliency: dict[str, NDArray[np.float32]], saliency_digest: str) -> Plan:
    """Allocate again from what the checkpoint's plan says it was asked for."""
    asked, architecture = source.plan.allocation, source.dense.architecture
    if asked is None:
        raise InputError(
            "uniform: expected a plan with the parameters pruning_ratio, gamma and round_to, got one without; "
            "make the plan with the allocate step"
        )
    allocation = replace(asked, rule="exact", scope="uniform")
    method = METHODS.get(str(source.plan.parameters.get("method")))
    keep = allocate(
        architecture.sites(),
        saliency,
        allocation,
        functools.partial(loadable_kv_groups, architecture),
        per_weight=method is not None and method.per_weight,
    )
    return Plan.build(
        architecture.sites(),
        keep,
        model_digest=source.plan.model_digest,
        model_type=source.plan.model_type,
        # the file says which units matter, not which text told: it may be another candidate's
        calibration_digest=f"unit saliency sha256:{saliency_digest}",
        allocation=allocation,
        parameters=source.plan.other_parameters,
    )


def _read_saliency(file: Path) -> dict[str, NDArray[np.float32]]:
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{file}: expected unit saliency as safetensors, got none that can be read "
            f"({' '.join(str(error).split())[:80]}); name a file of artifacts/unit_saliency/"
        ) from error


FORMAT = Format(
    prepare=_prepare,
    write=_write,
    measure=measure_in_transformers,
    positions=every_position,
    relative_tolerance=lambda options: TOLERANCE,
)
