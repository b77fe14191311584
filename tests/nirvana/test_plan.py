"""The plan: readable ranges, a faithful round trip, and refusal of what does not fit."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import all_families, family_configs, random_keep, t5_configs

from nirvana.allocation import Allocation
from nirvana.architectures.registry import architecture_for
from nirvana.architectures.site import Site, Slot
from nirvana.errors import InputError
from nirvana.files import write_json
from nirvana.plan import PLAN_NAME, Compensation, Plan
from nirvana.ranges import from_ranges, to_ranges


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
        allocation=Allocation(0.4, gamma=3.36),
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


def test_compensation_round_trip(plan, tmp_path):
    compensated = replace(plan, compensation=Compensation(ridge=0.3, calibration_digest="sha256:123"))
    compensated.write(tmp_path / "plan.json")
    value = json.loads((tmp_path / "plan.json").read_text())
    assert value["compensation"] == {"ridge": 0.3, "calibration_digest": "sha256:123"}
    assert Plan.read(tmp_path / "plan.json").compensation == compensated.compensation


def test_plans_that_say_nothing_of_compensation_have_none(plan, tmp_path):
    """Those of earlier releases lack the key."""
    plan.write(tmp_path / "plan.json")
    value = json.loads((tmp_path / "plan.json").read_text())
    assert value.pop("compensation", "missing") is None
    assert Plan.read(tmp_path / "plan.json").compensation is None
    (tmp_path / "plan.json").write_text(json.dumps(value))
    assert Plan.read(tmp_path / "plan.json").compensation is None


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


def test_a_type_that_is_not_the_models_is_refused(plan):
    plan.check_type("llama")
    with pytest.raises(InputError, match=r"expected a model of model_type 'llama' .* got one of 'qwen2'"):
        plan.check_type("qwen2")


@pytest.mark.parametrize("name", all_families())
def test_what_every_family_plans_contradicts_nothing(name, tmp_path):
    sites = architecture_for((family_configs() | t5_configs())[name]).sites()
    origin = {"model_digest": "m", "model_type": "t", "calibration_digest": "c", "allocation": Allocation(0.4)}
    Plan.build(sites, random_keep(sites), **origin).write(tmp_path / "plan.json")
    Plan.read(tmp_path / "plan.json").check_fits(sites, "m")


def test_layers_of_a_second_stack_follow_the_first(tmp_path):
    sites = architecture_for(t5_configs()["t5-relu-tied"]).sites()
    origin = {"model_digest": "m", "model_type": "t5", "calibration_digest": "c", "allocation": Allocation(0.4)}
    plan = Plan.build(sites, random_keep(sites), **origin)
    plan.write(tmp_path / "plan.json")
    value = json.loads((tmp_path / "plan.json").read_text())
    for site in value["sites"]:
        site["layer"] = int(site["name"].split(".")[1])  # the decoder's too
    value["model"]["num_layers"] = len({site["layer"] for site in value["sites"]})
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"sites: expected layer \d at (en|de)coder.0.*, as its name says, got 0"):
        Plan.read(tmp_path / "plan.json")


def test_a_key_that_stands_twice_is_refused(plan, tmp_path):
    plan.write(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text.replace('"pruning_ratio"', '"pruning_ratio": 0.9,\n  "pruning_ratio"'))
    with pytest.raises(InputError, match="the key 'pruning_ratio' stands twice"):
        Plan.read(tmp_path / "plan.json")


def test_experts_of_a_layer_that_keep_unequally_are_refused():
    name = next(name for name in family_configs() if "moe" in name)
    sites = architecture_for(family_configs()[name]).sites()
    keep = random_keep(sites)
    group = [site for site in sites if site.equal_with][1]
    keep[group.name] = keep[group.name][:-1]
    origin = {"model_digest": "m", "model_type": "t", "calibration_digest": "c", "allocation": Allocation(0.4)}
    with pytest.raises(InputError, match=f"plan: expected as many units at {group.name} as at"):
        Plan.build(sites, keep, **origin).check_fits(sites, None)


def every_unit(value):
    """A file of a few kilobytes that would have us make gigabytes of indices."""
    site = value["sites"][0]
    value["sites"] = [site | {"name": f"s{i}", "units": 1_000_000, "keep": "0-999999"} for i in range(51)]


def asked(**values):
    """Return what damages an allocation."""
    return lambda plan: plan["allocation"].update(values)


def other(site):
    """Return the module that a site is not of."""
    return "mlp" if site["module"] == "attention" else "attention"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda v: v.pop("sites"), "sites: expected a value, found none"),
        (lambda v: v.update(sites=[]), "sites: expected a list that is not empty, got []"),
        (lambda v: v.update(schema_version=3), "expected a plan of schema version 1 or 2, got 3"),
        (lambda v: v.update(schema_version=True), "expected a plan of schema version 1 or 2, got True"),
        (lambda v: v["sites"][0].update(keep="0-5"), r"sites[0].keep: expected ascending indices below 2, got 0-5"),
        (lambda v: v["sites"][1].update(keep=[0]), r"sites[1].keep: expected ranges such as '0-2,5', got [0]"),
        (lambda v: v["sites"][0].update(units="many"), "sites[0].units: expected a whole number from 1 to"),
        (lambda v: v["sites"][0].update(units=True), "sites[0].units: expected a whole number"),
        (lambda v: v["sites"][0].update(units=2.0), "sites[0].units: expected a whole number"),
        (lambda v: v["sites"][0].update(units=10**400), "sites[0].units: expected a whole number"),
        (lambda v: v["sites"][0].update(layer=-1), "sites[0].layer: expected a whole number from 0"),
        (lambda v: v["sites"][0].update(module="norm"), "sites[0].module: expected one of attention, mlp, got 'norm'"),
        (lambda v: v["sites"][0].update(name=v["sites"][1]["name"]), "expected each site once, got layers.0.mlp"),
        (every_unit, "sites[50].units: expected a whole number from 1 to 0, got 1000000"),
        (lambda v: v.update(achieved_ratio=[1]), "achieved_ratio: expected an object, got [1]"),
        (lambda v: v["achieved_ratio"].pop("mlp"), "achieved_ratio.mlp: expected a value, found none"),
        (lambda v: v["achieved_ratio"].update(mlp=0.5), 'achieved_ratio: expected {"total": 0.'),
        (asked(pruning_ratio=float("nan")), "got something else (NaN is no finite number)"),
        (lambda v: v.update(model=None), "model: expected an object, got None"),
        (lambda v: v["model"].update(num_layers=4), "model.num_layers: expected 3, the layers that the sites name"),
        (lambda v: v["model"].update(digest="a\x1bb"), r"model.digest: expected 1 to 200 printable characters"),
        (lambda v: v.pop("allocation"), "allocation: expected a value, found none"),
        (lambda v: v.update(allocation=None), "allocation: expected an object, got None"),
        (asked(pruning_ratio=1), "allocation: pruning_ratio: expected 0 <= ratio < 1, got 1"),
        (asked(pruning_ratio=True), "allocation.pruning_ratio: expected a number from 0 to 1, got True"),
        (asked(gamma=0), "allocation.gamma: expected a number above 0, at most 1e+09, got 0"),
        (asked(attention_factor=float("nan")), "got something else (NaN is no finite number)"),
        (asked(round_to=0), "allocation.round_to: expected a whole number from 1"),
        (asked(ranking="best"), "allocation.ranking: expected one of modules, joint, layers, got 'best'"),
        (asked(protected_layers=[1]), "allocation.protected_layers: expected 2 whole numbers from 0 to 1024, got [1]"),
        (asked(rule="published", scope="uniform"), "allocation: expected rule exact with scope uniform, got published"),
        (lambda v: v["sites"][0].update(layer=2), "expected layer 0 at layers.0."),
        (lambda v: v["sites"][0].update(module=other(v["sites"][0])), "sites: expected module"),
        (lambda v: v.update(compensation=[0.3]), "compensation: expected an object, got [0.3]"),
        (lambda v: v.update(compensation=False), "compensation: expected an object, got False"),
        (lambda v: v.update(compensation={}), "compensation.ridge: expected a value, found none"),
        (lambda v: v.update(compensation={"ridge": 1}), "compensation.calibration_digest: expected a value, found"),
        (lambda v: v.update(compensation={"ridge": 0}), "compensation.ridge: expected a number above 0, at most 1e+09"),
        (lambda v: v.update(compensation={"ridge": True}), "compensation.ridge: expected a number above 0"),
        (lambda v: v.update(compensation={"ridge": float("nan")}), "got something else (NaN is no finite number)"),
        (lambda v: v.update(compensation={"ridge": 10**400}), "compensation.ridge: expected a number above 0"),
        (
            lambda v: v.update(compensation={"ridge": 1, "calibration_digest": "a\x1bb"}),
            "compensation.calibration_digest: expected 1 to 200 printable characters",
        ),
        (lambda v: v["parameters"].update(note=float("inf")), "got something else (Infinity is no finite number)"),
        (lambda v: v["parameters"].update(note="\ud800"), "parameters: expected an object of finite numbers and text"),
        (lambda v: v["parameters"].update(a=[[[[[[[[[]]]]]]]]]), "at most 8 levels deep"),
    ],
)
def test_damaged_plan_is_one_clear_line(plan, tmp_path, damage, said):
    plan.write(tmp_path / "plan.json")
    value = json.loads((tmp_path / "plan.json").read_text())
    damage(value)
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(InputError) as caught:
        Plan.read(tmp_path / "plan.json")
    assert str(caught.value).startswith(f"{tmp_path / 'plan.json'}: ") and said in str(caught.value)
    assert "\n" not in str(caught.value)


def version_1(value, **parameters):
    """Write a plan as releases before schema version 2 did."""
    ratio = value.pop("allocation")["pruning_ratio"]
    return value | {"schema_version": 1, "requested_ratio": ratio, "parameters": {"pruning_ratio": ratio, **parameters}}


SPELT_OUT = {"gamma": 3.36, "round_to": 4, "rule": "published", "method": "nirvana", "attention_factor": None}


@pytest.mark.parametrize(
    ("parameters", "allocation"),
    [
        (SPELT_OUT, Allocation(0.4, gamma=3.36, round_to=4, rule="published")),
        (
            {"gamma": None, "round_to": 8, "ranking": "joint", "attention_factor": 2.0},
            Allocation(0.4, "joint", attention_factor=2.0),
        ),
        ({}, None),
        ({"gamma": "much", "round_to": 8}, None),
        ({"gamma": 3.36, "round_to": 8.5}, None),
        ({"gamma": 3.36, "round_to": 8, "ranking": ["joint"]}, None),
    ],
)
def test_plans_of_version_1_are_read_and_written_as_they_were(plan, parameters, allocation, tmp_path):
    plan.write(tmp_path / "plan.json")
    write_json(tmp_path / "old.json", version_1(json.loads((tmp_path / "plan.json").read_text()), **parameters))
    old = Plan.read(tmp_path / "old.json")
    assert (old.requested_ratio, old.allocation) == (0.4, allocation)
    old.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "old.json").read_bytes()
    assert old.other_parameters == (parameters if allocation is None else {}) | (
        {"pruning_ratio": 0.4} if allocation is None else {}
    ) | ({"method": "nirvana"} if parameters is SPELT_OUT else {})


@pytest.mark.parametrize("asked", [0.9, True, None])
def test_a_plan_of_version_1_says_its_ratio_twice_alike(plan, asked, tmp_path):
    plan.write(tmp_path / "plan.json")
    value = version_1(json.loads((tmp_path / "plan.json").read_text()))
    value["parameters"]["pruning_ratio"] = asked
    write_json(tmp_path / "old.json", value)
    with pytest.raises(InputError, match=rf"requested_ratio: expected parameters.pruning_ratio \({asked}\), got 0.4"):
        Plan.read(tmp_path / "old.json")


def test_one_unit_off_is_noticed_in_the_largest_models(tmp_path):
    """The allowed slack is far below one neuron: here 126 layers of 53,248, as in Llama 3.1 405B."""
    sites = [Site(f"layers.{n}.mlp_neuron", "mlp", n, 53_248, (Slot("w", 0, 1, 3 * 16_384),)) for n in range(126)]
    keep = {site.name: np.arange(site.units - 1000) for site in sites}
    origin = {"model_digest": "m", "model_type": "t", "calibration_digest": "c", "allocation": Allocation(0.1)}
    Plan.build(sites, keep, **origin).write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json").num_layers == 126
    value = json.loads((tmp_path / "plan.json").read_text())
    value["sites"][0]["keep"] = "0-52248"
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"achieved_ratio: expected \{\"total"):
        Plan.read(tmp_path / "plan.json")


def test_the_plan_of_a_checkpoint(plan, tmp_path):
    with pytest.raises(InputError, match="expected a plan or a pruned checkpoint with nirvana_plan"):
        Plan.read(tmp_path)
    plan.write(tmp_path / PLAN_NAME)
    assert Plan.read(tmp_path).model_digest == plan.model_digest


def test_truncated_plan(plan, tmp_path):
    plan.write(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text[: len(text) // 2])
    with pytest.raises(InputError, match="expected JSON"):
        Plan.read(tmp_path / "plan.json")
