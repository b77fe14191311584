"""What a plan comes to: requested and achieved ratio, units and weights, by module and by site."""

from dataclasses import asdict
from typing import Any

from nirvana.allocation import module_rates, removable_weights
from nirvana.plan import MODULES, Plan


def summarise(plan: Plan) -> dict[str, Any]:
    """Return what a plan says and what it comes to, as plain values that JSON can hold.

    Returns:
        `model`, `calibration`, `compensation`, `allocation` and `parameters` as in the plan (`allocation` None where a
        plan of version 1 does not spell it out); `modules`: for total, attention and
        mlp the requested (None where the plan does not say) and achieved ratio, units, kept units, weights and kept
        weights; `sites`: name, module, layer, units, kept units, weights and kept weights.
    """
    sites: list[dict[str, Any]] = [
        {
            "name": site.name,
            "module": site.module,
            "layer": site.layer,
            "units": site.units,
            "kept_units": len(site.keep_indices),
            "weights": site.units * site.weights_per_unit,
            "kept_weights": len(site.keep_indices) * site.weights_per_unit,
        }
        for site in plan.sites
    ]
    requested = requested_rates(plan)
    modules = {}
    for module in ("total", *MODULES):
        members = [site for site in sites if module in ("total", site["module"])]
        sums = {key: sum(site[key] for site in members) for key in ("units", "kept_units", "weights", "kept_weights")}
        modules[module] = {
            "requested_ratio": requested.get(module),
            "achieved_ratio": plan.achieved_ratio[module],
            **sums,
        }
    return {
        "model": {"digest": plan.model_digest, "model_type": plan.model_type, "num_layers": plan.num_layers},
        "calibration": {"digest": plan.calibration_digest},
        "compensation": None if plan.compensation is None else asdict(plan.compensation),
        "allocation": None if plan.allocation is None else asdict(plan.allocation),
        "parameters": plan.other_parameters,
        "modules": modules,
        "sites": sites,
    }


def requested_rates(plan: Plan) -> dict[str, float]:
    """Return the share that was asked of each module, before whole units are counted: total, attention and mlp.

    Ratio and gamma ask it. A rate that would pass its cap (one KV group, or one `round_to` block of neurons, stays in
    every layer) is clipped there and the other one meets the total, but for the published rule, which knows no caps.
    A plan has a total only where a joint ranking decides, layers are protected, or it does not say.
    """
    asked = plan.allocation
    weights = {m: sum(s.units * s.weights_per_unit for s in plan.sites if s.module == m) for m in MODULES}
    if asked is None or asked.ranking == "joint" or any(asked.protected_layers) or not all(weights.values()):
        return {"total": plan.requested_ratio}
    removable: dict[str, float] = dict.fromkeys(MODULES, 0.0)
    for site in plan.sites:
        removable[site.module] += removable_weights(site.module, site.units, site.weights_per_unit, asked.round_to)
    caps = None if asked.rule == "published" else removable
    return {"total": plan.requested_ratio, **module_rates(weights, caps, plan.requested_ratio, asked.gamma)}
