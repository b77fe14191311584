"""Step: the selected candidate's unit saliency -> the pruning plan."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from nirvana.architectures.registry import architecture_for, read_config
from nirvana.files import atomic_file, read_json
from nirvana.plan import Plan
from nirvana.weights import model_digest
from tasks.token_files import read_ids
from tasks.unit_saliency import allocate_as_asked, candidate_files, read_unit_saliency

if TYPE_CHECKING:
    from tasks.params import Params


def run(params: "Params", inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> None:
    """Write the plan and, for tables and plots, what it keeps of each layer."""
    architecture = architecture_for(read_config(inputs["model"]))
    selected = read_json(inputs["selection"])["selected"]
    saliency = read_unit_saliency(candidate_files(inputs["unit_saliency"])[selected])
    keep = allocate_as_asked(architecture, saliency, params.allocation)
    allocation = params.allocation
    plan = Plan.build(
        architecture.sites(),
        keep,
        model_digest=model_digest(inputs["model"]),
        model_type=architecture.config.model_type,
        calibration_digest=_calibration_digest(inputs["candidates"], selected),
        parameters={
            "method": params.saliency.method,
            "pruning_ratio": allocation.pruning_ratio,
            "gamma": allocation.gamma,
            "round_to": allocation.round_to,
            "rule": allocation.rule,
            "scope": allocation.scope,
        },
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


def _calibration_digest(candidates: Path, selected: int) -> str:
    digest = hashlib.sha256()
    for pool in read_ids(candidates):
        ids = pool[selected].numpy()
        digest.update(f"{ids.dtype}{ids.shape}".encode() + ids.tobytes())
    return f"sha256:{digest.hexdigest()}"
