"""The sweeps: where units leave, gammas and factors, speed of rounded checkpoints; nothing runs twice."""

import numpy as np
import pytest
from sweeps import counted, measured, tiny_comparison
from tiny import tiny_llama

from nirvana.allocation import Allocation, achieved_ratio, allocate, module_rates
from nirvana.architectures.site import Site, Slot
from nirvana.errors import InputError
from nirvana.walk import Stack
from studies import sweeps
from studies.comparison import Comparison
from studies.measure import UNREACHABLE
from studies.methods import keep_elsewhere
from studies.sweeps import groups, is_capped, ratio_of_rounds
from studies.variants import Variant


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 256, "num_hidden_layers": 3}
    return tiny_llama(tmp_path_factory.mktemp("sweeps") / "model", **shape)


@pytest.fixture
def comparison(model_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny_comparison(model_directory)


# --- where units leave ------------------------------------------------------------------------------------------


def site(module, layer, units, weights_per_unit):
    return Site(f"layers.{layer}.{module}", module, layer, units, (Slot(f"{module}.{layer}", 0, 1, weights_per_unit),))


# two layers: attention 2 · 3 groups of 10 weights, MLP 2 · 10 neurons of 7: 200 in all
SITES = [site(module, layer, *size) for layer in (0, 1) for module, size in (("attention", (3, 10)), ("mlp", (10, 7)))]
SALIENCY = {
    "layers.0.attention": np.array([3, 1, 2], np.float32),
    "layers.1.attention": np.array([6, 4, 9], np.float32),
    "layers.0.mlp": np.arange(10, dtype=np.float32),
    "layers.1.mlp": np.arange(10, dtype=np.float32) + 4.5,
}


def lost(keep):
    return {s.name: sorted(set(range(s.units)) - set(keep[s.name].tolist())) for s in SITES}


def test_attention_alone_by_hand():
    """0.15 of 200 weights is three groups: those of 1, 2 and 4, for the 3 of layer 0 is its last."""
    found = lost(keep_elsewhere(SITES, SALIENCY, "attention", 0.15))
    assert found == {"layers.0.attention": [1, 2], "layers.1.attention": [1], "layers.0.mlp": [], "layers.1.mlp": []}
    nearest = lost(keep_elsewhere(SITES, SALIENCY, "attention", 0.13))  # 26 weights: 30 is nearer than 20
    assert nearest == found


def test_mlp_alone_by_hand():
    """0.21 of 200 weights is six neurons: 0 to 4 of layer 0 and 4.5 of layer 1."""
    found = lost(keep_elsewhere(SITES, SALIENCY, "mlp", 0.21, round_to=1))
    assert found["layers.0.mlp"] == [0, 1, 2, 3, 4] and found["layers.1.mlp"] == [0]
    assert found["layers.0.attention"] == found["layers.1.attention"] == []


def test_mlp_alone_is_the_limit_of_a_large_gamma(model_directory):
    sites = Stack.open(model_directory).architecture.sites()
    generator = np.random.default_rng(0)
    saliency = {each.name: generator.random(each.units, dtype=np.float32) for each in sites}
    keep = keep_elsewhere(sites, saliency, "mlp", 0.3)
    expected = allocate(sites, saliency, Allocation(0.3, gamma=1e9))
    assert all(np.array_equal(keep[name], expected[name]) for name in expected)
    assert all(len(keep[each.name]) % 8 == 0 for each in sites if each.module == "mlp")


@pytest.mark.parametrize(("module", "most"), [("attention", "0.2"), ("mlp", "0.63")])
def test_a_module_that_is_too_small_says_what_it_could_give(module, most):
    """Four groups of 10 and eighteen neurons of 7, of 200."""
    with pytest.raises(InputError, match=f"cannot be reached in {module} alone: at most {most} of"):
        keep_elsewhere(SITES, SALIENCY, module, 0.64, round_to=1)


def test_rows_prune_where_they_say_and_nothing_twice(comparison, monkeypatch):
    with counted(monkeypatch) as calls:
        rows = measured("modules", comparison, ratios="0.05,0.5")
    by = {(row["method"], row["ratio"], row.get("where")): row for row in rows}
    assert len(by) == 1 + 2 * 2 * 3
    for name in ("nirvana", "fisher"):
        for ratio, where, whole in ((0.05, "attention", "mlp"), (0.05, "mlp", "attention"), (0.5, "mlp", "attention")):
            row = by[name, ratio, where]
            assert row["modules"][whole]["achieved"] == 0
            assert row["achieved_ratio"] == pytest.approx(ratio, abs=0.025)  # one KV group is 0.016 of all
        assert "in attention alone" in by[name, 0.5, "attention"][UNREACHABLE]
    assert by["fisher", 0.5, "both"]["losses"] == comparison.row(Variant("fisher", 0.5))["losses"]
    assert len(calls) == len({str(row.get("losses")) for row in rows} - {"None"})  # equal models are judged once
    again = tiny_comparison(comparison.model_directory)
    with counted(monkeypatch) as calls:
        assert measured("modules", again, ratios="0.05,0.5") == rows
    assert calls == [] and "stack" not in vars(again)  # nothing was opened


def test_the_judged_model_is_the_one_that_was_chosen(comparison):
    """The row's own count of parameters and rates, from the units that stay."""
    variant = Variant("nirvana", 0.05, where="attention")
    row, sites = comparison.row(variant), comparison.sites
    keep = keep_elsewhere(sites, comparison.scores(variant).saliency, "attention", 0.05)
    rates = achieved_ratio(sites, {name: len(kept) for name, kept in keep.items()})
    assert row["achieved_ratio"] == rates["total"]
    assert row["modules"]["attention"]["achieved"] == rates["attention"]
    removed = sum((each.units - len(keep[each.name])) * each.weights_per_unit for each in sites)
    assert comparison.dense()["parameters"] - row["parameters"] == removed


@pytest.mark.parametrize("name", ["wanda_sp", "llm_pruner", "flop"])
def test_a_method_that_ranks_otherwise_is_refused(name, comparison):
    with pytest.raises(InputError, match=r"ranks the units of all layers together|got 'flop'"):
        measured("modules", comparison, methods=name)


# --- gammas and factors -----------------------------------------------------------------------------------------


def test_every_gamma_and_the_joint_ranking_are_judged_once(comparison, monkeypatch):
    with counted(monkeypatch) as calls:
        rows = measured("gamma_sweep", comparison, gammas="0.5,8", ratios="0.4")
    assert [(row["method"], row.get("gamma")) for row in rows] == [
        ("dense", None),
        ("nirvana", 0.5),
        ("nirvana", 3.36),  # the published one always takes part
        ("nirvana", 8.0),
        ("fisher", None),
    ]
    assert len(calls) == 5
    low, high = (row["modules"] for row in (rows[1], rows[3]))
    assert low["attention"]["achieved"] > high["attention"]["achieved"]
    assert low["mlp"]["achieved"] < high["mlp"]["achieved"]
    assert rows[2]["losses"] == comparison.row(Variant("nirvana", 0.4))["losses"]


def test_what_is_wrong_otherwise_is_not_swallowed(comparison, monkeypatch):
    monkeypatch.setattr(Comparison, "judged_by", lambda *_: (_ for _ in ()).throw(InputError("expected finite losses")))
    with pytest.raises(InputError, match="expected finite losses"):
        measured("gamma_sweep", comparison, ratios="0.2")


def test_capped_by_hand():
    """Attention 100 weights in 10 groups, MLP 300: at ratio 0.4 and gamma 0.5, p_attn = 0.4 · 400 / 250 = 0.64."""
    assert module_rates({"attention": 100, "mlp": 300}, None, 0.4, 0.5)["attention"] == pytest.approx(0.64)
    for achieved, capped in ((0.6, False), (0.5, True)):  # 6 of 10 groups: rounded down
        attention = {"weights": 100, "units": 10, "achieved": achieved}
        assert is_capped({"attention": attention, "mlp": {"weights": 300}}, 0.4, 0.5) is capped


def test_a_larger_factor_keeps_more_groups_and_what_keeps_the_same_is_judged_once(comparison, monkeypatch):
    with counted(monkeypatch) as calls:
        dense, *rows = measured("attention_factor", comparison, factors="0.01,100,999", ratios="0.3")
    assert dense["method"] == "dense" and [row["attention_factor"] for row in rows] == [0.01, 2.0, 100.0, 999.0]
    kept = [row["modules"]["attention"]["kept"] for row in rows]
    assert kept == sorted(kept) and kept[0] < kept[-1] == rows[0]["modules"]["attention"]["units"] == 12
    assert all(row["achieved_ratio"] == pytest.approx(0.3, abs=0.025) for row in rows)
    # 100 and 999 keep every group, and so the same neurons: one model, judged once
    assert rows[2]["losses"] == rows[3]["losses"]
    assert len(calls) == 1 + len({str(row["losses"]) for row in rows})
    assert rows[1]["losses"] == comparison.row(Variant("fisher", 0.3, "least_squares"))["losses"]


# --- speed ------------------------------------------------------------------------------------------------------


SMALL = {"ratios": "0.4", "round_to": "1,32", "prompt_length": "8", "decode_tokens": "2", "repeats": "3"}


def timed(comparison, **changed):
    return measured("alignment", comparison, **(SMALL | changed))


def test_what_is_timed_is_the_rounded_checkpoint(comparison, monkeypatch, tmp_path):
    seen, original = {}, sweeps.measure_rounds

    def look(models, workload):
        seen.update({n: [x.mlp.gate_proj.out_features for x in m.model.layers] for n, m in models.items()})
        return original(models, workload)

    monkeypatch.setattr(sweeps, "measure_rounds", look)
    rows = timed(comparison)
    assert list(seen) == ["dense", "0", "1"] and all(count == 256 for count in seen["dense"])
    assert all(count % 32 == 0 for count in seen["1"]) and any(count % 32 for count in seen["0"])
    keep = comparison.keep(Variant("nirvana", 0.4, round_to=32))
    assert seen["1"] == [len(keep[s.name]) for s in comparison.sites if s.module == "mlp"]
    assert all(row[f"{phase}_{name}"] > 0 for row in rows[1:] for phase in sweeps.PHASES for name in ("ms", "ratio"))
    assert not [file for file in (tmp_path / ".cache/studies/alignment").iterdir() if file.is_dir()]
    seen.clear()
    again = tiny_comparison(comparison.model_directory)
    assert timed(again) == rows and seen == {} and "stack" not in vars(again)  # nothing was opened
    timed(again, repeats="1")
    assert seen  # another workload is timed anew


def test_a_rounding_is_another_row(comparison):
    fine, coarse = (comparison.row(Variant("nirvana", 0.4, round_to=multiple)) for multiple in (1, 32))
    assert fine["losses"] != coarse["losses"]
    assert comparison.row(Variant("nirvana", 0.4)) == comparison.row(Variant("nirvana", 0.4, round_to=8))


def test_a_ratio_out_of_reach_is_not_timed(comparison, monkeypatch):
    monkeypatch.setattr(sweeps, "measure_rounds", lambda *_: pytest.fail("timed"))
    assert [UNREACHABLE in row for row in timed(comparison, ratios="0.99")] == [False, True, True]


def test_a_rounding_larger_than_a_layer_is_refused(comparison):
    with pytest.raises(InputError, match="round_to: expected 1 to 256"):
        timed(comparison, round_to="512")


def test_models_that_do_not_fit_together_are_timed_each_with_the_dense_one(model_directory, monkeypatch):
    directories = dict.fromkeys(("dense", "1", "8"), model_directory)
    assert groups(directories) == [["dense", "1", "8"]]
    monkeypatch.setattr(sweeps, "available_bytes", lambda device: 1)
    assert groups(directories) == [["dense", "1"], ["dense", "8"]]


def test_a_ratio_is_taken_round_by_round():
    """Both twice as slow in the second round: the ratio does not see it."""
    assert ratio_of_rounds([1.0, 2.0, 1.5], [2.0, 4.0, 2.0]) == {"ratio": 0.5, "low": 0.5, "high": 0.625}
    assert ratio_of_rounds(np.array([3.0]), [2.0]) == {"ratio": 1.5, "low": 1.5, "high": 1.5}
