"""Step: the unit saliency of the selected candidate, or the mean of the best ones -> the pruning plan."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from nirvana.architectures.registry import architecture_for, read_config
from nirvana.calibration import calibration_digest
from nirvana.files import atomic_file, read_json
from nirvana.plan import Compensation, Plan
from nirvana.walk import as_streams
from nirvana.weights import model_digest
from tasks.token_files import read_ids
from tasks.unit_saliency import allocate_as_asked, averaged_saliency, best_candidates, candidate_files

if TYPE_CHECKING:
    from tasks.params import Params


def run(params: "Params", inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> None:
    """Write the plan and, for tables and plots, what it keeps of each layer."""
    architecture = architecture_for(read_config(inputs["model"]))
    scores, averaged = read_json(inputs["selection"])["scores"], params.calibration.averaged
    saliency = averaged_saliency(candidate_files(inputs["unit_saliency"]), scores, averaged)
    chosen = best_candidates(scores, averaged)
    calibration = [torch.cat([pool[index] for index in chosen]) for pool in read_ids(inputs["candidates"])]
    keep = allocate_as_asked(architecture, saliency, params.allocation)
    allocation, compensation = params.allocation, None
    if params.compensation.method == "least_squares":
        fitted_on = calibration_digest(as_streams(read_ids(inputs["compensation_ids"])))
        compensation = Compensation(params.compensation.ridge, fitted_on)
    plan = Plan.build(
        architecture.sites(),
        keep,
        model_digest=model_digest(inputs["model"]),
        model_type=architecture.config.model_type,
        calibration_digest=calibration_digest(tuple(calibration)),
        parameters={
            "method": params.saliency.method,
            "candidates_averaged": averaged,
            "pruning_ratio": allocation.pruning_ratio,
            "ranking": allocation.ranking,
            "gamma": allocation.gamma if allocation.ranking == "modules" else None,
            "attention_factor": allocation.attention_factor if allocation.ranking == "joint" else None,
            "round_to": allocation.round_to,
            "rule": allocation.rule,
            "scope": allocation.scope,
        },
        compensation=compensation,
    )
    with atomic_file(outputs["allocation"]) as temporary:
        _by_layer(plan).to_csv(temporary, index=False)
    plan.write(outputs["plan"])


def _by_layer(plan: Plan) -> pd.DataFrame:
    """Return a row a layer and module: experts, or self- and cross-attention, are added up."""
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
    return table
