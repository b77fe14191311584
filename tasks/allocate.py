"""Step: the selected candidate's unit saliency -> the pruning plan."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from safetensors.numpy import load_file

from nirvana.architectures.registry import architecture_for, read_config
from nirvana.files import atomic_file, read_json
from nirvana.plan import Plan
from nirvana.weights import model_digest
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
    rows = [
        {
            "layer": site.layer,
            "module": site.module,
            "units": site.units,
            "kept": len(site.keep_indices),
            "kept_share": len(site.keep_indices) / site.units,
            "weights": site.units * site.weights_per_unit,
            "kept_weights": len(site.keep_indices) * site.weights_per_unit,
        }
        for site in plan.sites
    ]
    with atomic_file(outputs["allocation"]) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False)
    plan.write(outputs["plan"])


def _calibration_digest(candidates: Path, selected: int) -> str:
    ids = load_file(candidates)["input_ids"][selected]
    return "sha256:" + hashlib.sha256(f"{ids.dtype}{ids.shape}".encode() + ids.tobytes()).hexdigest()
