"""Step: the unit saliency of the selected candidate, or the mean of the best ones -> the pruning plan."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from nirvana.architectures.registry import architecture_for, read_config
from nirvana.architectures.site import Site
from nirvana.calibration import calibration_digest
from nirvana.files import atomic_file, read_json
from nirvana.plan import Compensation, Plan
from nirvana.saliency import idle_experts
from nirvana.walk import as_streams
from nirvana.weights import model_digest
from tasks.corpus.token_files import read_ids
from tasks.unit_saliency import allocate_as_asked, averaged_saliency, best_candidates, candidate_files

if TYPE_CHECKING:
    from tasks.params import Params

_LOG = logging.getLogger(__name__)


def run(params: "Params", inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> None:
    """Write the plan and, for tables and plots, what it keeps of each layer."""
    architecture = architecture_for(read_config(inputs["model"]))
    scores, averaged = read_json(inputs["selection"])["scores"], params.calibration.averaged
    saliency = averaged_saliency(candidate_files(inputs["unit_saliency"]), scores, averaged)
    chosen = best_candidates(scores, averaged)
    calibration = [torch.cat([pool[index] for index in chosen]) for pool in read_ids(inputs["candidates"])]
    idle = _warn_of_idle_experts(architecture.sites(), saliency)
    keep, compensation = allocate_as_asked(architecture, saliency, params), None
    if params.compensation.method == "least_squares":
        fitted_on = calibration_digest(as_streams(read_ids(inputs["compensation_ids"])))
        compensation = Compensation(params.compensation.ridge, fitted_on)
    plan = Plan.build(
        architecture.sites(),
        keep,
        model_digest=model_digest(inputs["model"]),
        model_type=architecture.config.model_type,
        calibration_digest=calibration_digest(tuple(calibration)),
        allocation=params.allocation,
        parameters={"method": params.saliency.method, "candidates_averaged": averaged},
        compensation=compensation,
    )
    with atomic_file(outputs["allocation"]) as temporary:
        _by_layer(plan, idle).to_csv(temporary, index=False)
    plan.write(outputs["plan"])


def _warn_of_idle_experts(sites: Sequence[Site], saliency: Mapping[str, NDArray[np.float32]]) -> pd.DataFrame | None:
    """Return how many experts each layer has and how many of them met no token; None without experts."""
    experts = [site for site in sites if site.equal_with is not None]
    if not experts:
        return None
    idle = set(idle_experts(experts, saliency))
    if idle:
        _LOG.warning(
            "%d of %d experts met no token of the calibration: their units score zero and are cut first; raise "
            "calibration.sequences or calibration.sequence_length",
            len(idle),
            len(experts),
        )
    rows = pd.DataFrame(
        {"layer": site.layer, "module": site.module, "experts": 1, "idle_experts": int(site.name in idle)}
        for site in experts
    )
    return rows.groupby(["layer", "module"], as_index=False).sum()


def _by_layer(plan: Plan, idle: pd.DataFrame | None) -> pd.DataFrame:
    """Return a row a layer and module: experts, or self- and cross-attention, are added up; with idle ones counted."""
    sites = pd.DataFrame(
        {
            "layer": site.layer,
            "module": site.module,
            "units": site.units,
            "kept": len(site.keep_indices),
            "weights": site.units * site.weights_per_unit,
            "kept_weights": len(site.keep_indices) * site.weights_per_unit,
        }
        for site in plan.sites
    )
    table = sites.groupby(["layer", "module"], as_index=False, sort=False).sum()
    table.insert(4, "kept_share", table["kept"] / table["units"])
    if idle is None:
        return table
    table = table.merge(idle, on=["layer", "module"], how="left").fillna({"experts": 0, "idle_experts": 0})
    return table.astype({"experts": int, "idle_experts": int})
