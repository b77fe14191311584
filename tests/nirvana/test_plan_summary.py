"""What ratio and gamma ask of each module."""

from dataclasses import replace

import numpy as np
import pytest

from nirvana.allocation import Allocation
from nirvana.plan import Plan, PlannedSite
from nirvana.plan_summary import requested_rates

SITES = (("attention", 4, 400), ("mlp", 64, 75))
"""One layer, a quarter of its weights in attention: module, units, weights a unit."""


def plan_of(sites, ratio, gamma, rule="exact", **more):
    planned = tuple(PlannedSite(f"{i}", module, 0, *size, np.arange(1)) for i, (module, *size) in enumerate(sites))
    return Plan("", "llama", 1, "", Allocation(ratio, gamma=gamma, rule=rule, **more), {}, planned)


def test_the_request_of_each_module_follows_ratio_and_gamma():
    asked = requested_rates(plan_of(SITES, 0.2, 3.0))
    assert asked == pytest.approx({"total": 0.2, "attention": 0.08, "mlp": 0.24})
    # attention would lose 0.8 of its weights but must keep one group of four: the MLP makes up for it
    steep = requested_rates(plan_of(SITES, 0.35, 0.25))
    assert steep == pytest.approx({"total": 0.35, "attention": 0.75, "mlp": 65 / 300})
    assert requested_rates(plan_of(SITES, 0.35, 0.25, "published"))["attention"] == pytest.approx(0.8)
    # the MLP would lose all of its weights but must keep 8 of 64 neurons
    wide = requested_rates(plan_of(SITES, 0.7, 20.0))
    assert wide == pytest.approx({"total": 0.7, "attention": 0.175, "mlp": 0.875})


def test_every_expert_keeps_a_block():
    experts = (SITES[0], *[("mlp", 16, 75)] * 4)
    assert requested_rates(plan_of(experts, 0.5, 20.0)) == pytest.approx({"total": 0.5, "attention": 0.5, "mlp": 0.5})


def test_where_gamma_does_not_decide_the_total_only_is_asked_for():
    assert requested_rates(plan_of(SITES, 0.2, 3.0, ranking="joint")) == {"total": 0.2}
    assert requested_rates(plan_of(SITES, 0.2, 3.0, ranking="layers", protected_layers=(3, 1))) == {"total": 0.2}
    silent = replace(plan_of(SITES, 0.2, 3.0), allocation=None, parameters={"pruning_ratio": 0.2}, schema_version=1)
    assert requested_rates(silent) == {"total": 0.2}
