"""The plan: readable ranges, a faithful round trip, and refusal of what does not fit."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import family_configs, random_keep

from nirvana.architectures.registry import architecture_for
from nirvana.errors import InputError
from nirvana.plan import Plan, from_ranges, to_ranges


@pytest.fixture
def sites():
    return architecture_for(family_configs()["llama"]).sites()


@pytest.fixture
def plan(sites):
    return Plan.build(
        sites,
        random_keep(sites),
        model_digest="sha256:abc",
        model_type="llama",
        calibration_digest="sha256:def",
        parameters={"pruning_ratio": 0.4, "gamma": 3.36},
    )


def test_ranges_by_hand():
    assert to_ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert from_ranges("0-2,5,7-8", 9).tolist() == [0, 1, 2, 5, 7, 8]


@given(st.sets(st.integers(0, 300), min_size=1))
def test_ranges_round_trip(indices):
    assert from_ranges(to_ranges(sorted(indices)), 301).tolist() == sorted(indices)


@pytest.mark.parametrize(
    "text", ["", "3-1", "0,0", "2,1", "0-9", "9", "a", "0-", "-1", "0;1", "1e3", "٣", "0-99999999999999"]
)
def test_bad_ranges_are_refused(text):
    with pytest.raises(InputError, match="keep: expected"):
        from_ranges(text, 9)


def test_round_trip(plan, tmp_path):
    plan.write(tmp_path / "plan.json")
    again = Plan.read(tmp_path / "plan.json")
    again.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()
    assert all(np.array_equal(again.keep[name], kept) for name, kept in plan.keep.items())


def test_achieved_ratio_counts_weights(plan, sites):
    removed = sum((s.units - len(plan.keep[s.name])) * s.weights_per_unit for s in sites)
    assert plan.achieved_ratio["total"] == removed / sum(s.weights for s in sites)


def test_other_model_is_refused(plan, sites):
    plan.check_fits(sites, "sha256:abc")
    plan.check_fits(sites, None)
    with pytest.raises(InputError, match="expected the model sha256:abc"):
        plan.check_fits(sites, "sha256:other")
    other = architecture_for(family_configs()["llama-mha"]).sites()
    with pytest.raises(InputError, match=r"2 units of .* at layers.0.kv_group, got one with 4 units"):
        plan.check_fits(other, None)
    with pytest.raises(InputError, match="got one with nothing"):
        plan.check_fits(sites[:-1], None)


@pytest.mark.parametrize(
    "damage",
    [
        lambda v: v.pop("sites"),
        lambda v: v.update(schema_version=2),
        lambda v: v["sites"][0].update(keep="0-5"),
        lambda v: v["sites"][0].update(units="many"),
        lambda v: v.update(achieved_ratio=[1]),
        lambda v: v.update(model=None),
    ],
)
def test_damaged_plan_is_one_clear_line(plan, tmp_path, damage):
    plan.write(tmp_path / "plan.json")
    value = json.loads((tmp_path / "plan.json").read_text())
    damage(value)
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"plan\.json: .*expected") as caught:
        Plan.read(tmp_path / "plan.json")
    assert "\n" not in str(caught.value)


def test_truncated_plan(plan, tmp_path):
    plan.write(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text[: len(text) // 2])
    with pytest.raises(InputError, match="expected JSON"):
        Plan.read(tmp_path / "plan.json")
