"""Allocation: hand-computed cases first, then what must hold for any saliency."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nirvana.allocation import Allocation, achieved_ratio, allocate
from nirvana.architectures.site import Site, Slot
from nirvana.errors import InputError


def make_sites(layers=2, groups=2, neurons=8, group_weights=12, neuron_weights=3):
    sites = []
    for layer in range(layers):
        kv = Slot(f"{layer}.q", 0, group_weights, 1)
        mlp = Slot(f"{layer}.up", 0, 1, neuron_weights)
        sites.append(Site(f"layers.{layer}.kv_group", "attention", layer, groups, (kv,)))
        sites.append(Site(f"layers.{layer}.mlp_neuron", "mlp", layer, neurons, (mlp,)))
    return tuple(sites)


def ascending(sites):
    """Saliency that grows with layer and index: the first units leave first."""
    return {s.name: (np.arange(s.units) + 100.0 * s.layer).astype(np.float32) for s in sites}


def ratio(sites, keep):
    return achieved_ratio(sites, {name: len(kept) for name, kept in keep.items()})["total"]


def test_exact_by_hand():
    """2 layers of 2 groups (12 weights) and 8 neurons (3): A = 48, M = 48, r = 0.5, gamma = 1.

    Both rates are 0.5. Groups: floor(0.5·4) = 2 leave; the best of each layer is protected, so group 0 of both goes.
    Neurons: 48 − 24 = 24 weights = 8 neurons leave: all of layer 0 would, but one block of 2 must stay there, so the
    cut goes on into layer 1, in blocks of 2.
    """
    sites = make_sites()
    keep = allocate(sites, ascending(sites), Allocation(0.5, gamma=1.0, round_to=2))
    assert keep["layers.0.kv_group"].tolist() == [1]
    assert keep["layers.1.kv_group"].tolist() == [1]
    assert keep["layers.0.mlp_neuron"].tolist() == [6, 7]
    assert keep["layers.1.mlp_neuron"].tolist() == [2, 3, 4, 5, 6, 7]
    assert ratio(sites, keep) == 0.5


def test_published_by_hand():
    """Same sites: the threshold takes all of layer 0's groups, so its *last* stays; nothing makes up for it."""
    sites = make_sites()
    saliency = ascending(sites)
    saliency["layers.0.kv_group"] = np.array([5.0, 1.0], dtype=np.float32)
    keep = allocate(sites, saliency, Allocation(0.5, gamma=1.0, round_to=2, rule="published"))
    assert keep["layers.0.kv_group"].tolist() == [1]  # the best would be 0
    assert keep["layers.1.kv_group"].tolist() == [0, 1]
    assert keep["layers.0.mlp_neuron"].tolist() == [6, 7]
    assert keep["layers.1.mlp_neuron"].tolist() == list(range(8))
    assert ratio(sites, keep) == pytest.approx((12 + 18) / 96)


def test_published_ties_leave_together():
    sites = make_sites(layers=1, groups=4, neurons=8)
    saliency = {s.name: np.ones(s.units, dtype=np.float32) for s in sites}
    keep = allocate(sites, saliency, Allocation(0.25, gamma=1.0, round_to=2, rule="published"))
    assert keep["layers.0.kv_group"].tolist() == [3]
    assert len(keep["layers.0.mlp_neuron"]) == 2
    exact = allocate(sites, saliency, Allocation(0.25, gamma=1.0, round_to=2))
    assert len(exact["layers.0.kv_group"]) == 3


def test_gamma_is_the_quotient_of_the_rates():
    sites = make_sites(layers=4, groups=1000, neurons=2000)
    keep = allocate(sites, ascending(sites), Allocation(0.2, gamma=4.0, round_to=1))
    achieved = achieved_ratio(sites, {n: len(k) for n, k in keep.items()})
    assert achieved["mlp"] / achieved["attention"] == pytest.approx(4.0, rel=0.02)


def test_capped_rate_is_made_up_by_the_other():
    """One KV group a layer: attention cannot give anything, the neurons give all."""
    sites = make_sites(layers=3, groups=1, neurons=100, group_weights=30)
    keep = allocate(sites, ascending(sites), Allocation(0.5, gamma=0.1, round_to=1))
    assert all(len(keep[f"layers.{i}.kv_group"]) == 1 for i in range(3))
    assert ratio(sites, keep) == pytest.approx(0.5, abs=3 / (3 * 330))


def test_unreachable_ratio_names_the_reachable():
    sites = make_sites(layers=1, groups=1, neurons=8, group_weights=12)  # 36 weights, 6 neurons of 3 may leave
    with pytest.raises(InputError, match=r"0\.6 cannot be reached.*at most 0\.5 "):
        allocate(sites, ascending(sites), Allocation(0.6, gamma=1.0, round_to=2))
    assert ratio(sites, allocate(sites, ascending(sites), Allocation(0.5, gamma=1.0, round_to=2))) == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pruning_ratio": 1.0}, "0 <= ratio < 1, got 1.0"),
        ({"pruning_ratio": -0.1}, "0 <= ratio < 1"),
        ({"gamma": 0.0}, "above 0, got 0.0"),
        ({"gamma": float("inf")}, "finite"),
        ({"round_to": 9}, "expected 1 to 8 .*layer 0.*got 9"),
        ({"scope": "uniform", "rule": "published"}, "expected rule exact with scope uniform, got published"),
    ],
)
def test_bad_requests_are_refused(change, message):
    sites = make_sites()
    request = {"pruning_ratio": 0.2, "gamma": 1.0, "round_to": 2} | change
    with pytest.raises(InputError, match=message):
        allocate(sites, ascending(sites), Allocation(**request))


def test_foreign_saliency_is_refused():
    sites = make_sites()
    saliency = ascending(sites)
    saliency["layers.1.mlp_neuron"] = saliency["layers.1.mlp_neuron"][:-1]
    with pytest.raises(InputError, match="expected 8 finite saliency values"):
        allocate(sites, saliency, Allocation(0.2, gamma=1.0))


def test_ratio_zero_keeps_everything():
    sites = make_sites(neurons=9)
    keep = allocate(sites, ascending(sites), Allocation(0.0, gamma=3.0, round_to=4))
    assert all(len(keep[s.name]) == s.units for s in sites)


def test_uniform_by_hand_takes_loadable_counts():
    sites = make_sites(layers=2, groups=4, neurons=16)
    saliency = ascending(sites)
    asked = Allocation(0.5, gamma=1.0, round_to=2, scope="uniform")
    keep = allocate(sites, saliency, asked, loadable_kv_groups=lambda k: k != 2)
    counts = {s.name: len(keep[s.name]) for s in sites}
    assert counts["layers.0.kv_group"] == counts["layers.1.kv_group"] == 3  # 2 wanted, 1 and 3 as near: more stay
    assert counts["layers.0.mlp_neuron"] == counts["layers.1.mlp_neuron"] == 4
    assert keep["layers.0.kv_group"].tolist() == [1, 2, 3]  # the best stay
    assert ratio(sites, keep) == 0.5


shapes = st.fixed_dictionaries(
    {
        "layers": st.integers(1, 5),
        "groups": st.integers(1, 8),
        "neurons": st.integers(8, 70),
        "group_weights": st.integers(1, 60),
        "neuron_weights": st.integers(1, 12),
    }
)


def test_neurons_too_few_to_make_up_for_a_group():
    """One layer, groups of 60 weights, 8 neurons of 1 that must all stay: 0, 60/248, ... and nothing between."""
    sites = make_sites(layers=1, groups=4, neurons=8, group_weights=60, neuron_weights=1)
    with pytest.raises(InputError, match=r"0\.1 cannot be reached: .* nearest reachable ratio is 0\.0000"):
        allocate(sites, ascending(sites), Allocation(0.1, gamma=1.0, round_to=8))
    keep = allocate(sites, ascending(sites), Allocation(0.24, gamma=1.0, round_to=8))
    assert len(keep["layers.0.kv_group"]) == 3


def test_uniform_names_the_nearest_ratio():
    few = make_sites(layers=2, groups=2, neurons=4, group_weights=100)
    with pytest.raises(InputError, match=r"nearest reachable ratio is 0\.4"):
        allocate(few, ascending(few), Allocation(0.3, gamma=1.0, round_to=2, scope="uniform"))


def test_layers_of_different_size():
    small, large = make_sites(layers=1, groups=2, neurons=8), make_sites(layers=2, groups=6, neurons=40)[2:]
    sites = small + large
    saliency = {s.name: np.linspace(1, 2, s.units, dtype=np.float32) for s in sites}
    keep = allocate(sites, saliency, Allocation(0.4, gamma=1.0, round_to=2))
    assert abs(ratio(sites, keep) - 0.4) * sum(s.weights for s in sites) <= 6


@settings(max_examples=300, deadline=None)
@given(
    shape=shapes,
    pruning_ratio=st.floats(0, 0.99),
    gamma=st.floats(0.05, 20),
    round_to=st.sampled_from([1, 2, 8]),
    seed=st.integers(0, 1000),
    ties=st.booleans(),
    scope=st.sampled_from(["global", "uniform"]),
)
def test_ratio_is_met_or_refused(shape, pruning_ratio, gamma, round_to, seed, ties, scope):
    sites = make_sites(**shape)
    generator = np.random.default_rng(seed)
    saliency = {
        s.name: (generator.integers(0, 3, s.units) if ties else generator.lognormal(0, 3, s.units)).astype(np.float32)
        for s in sites
    }
    try:
        keep = allocate(sites, saliency, Allocation(pruning_ratio, gamma=gamma, round_to=round_to, scope=scope))
    except InputError as error:
        assert "cannot be reached" in str(error)
        return
    total = sum(site.weights for site in sites)
    blocks = 1 if scope == "global" else shape["layers"]
    # the last block of a layer may be smaller than round_to: a layer keeps all of it or none
    assert abs(ratio(sites, keep) - pruning_ratio) * total <= blocks * round_to * shape["neuron_weights"] + 1e-6
    for site in sites:
        kept = keep[site.name]
        assert len(kept) >= 1
        assert (np.diff(kept) > 0).all()
        if site.module == "mlp":
            assert len(kept) % round_to == 0 or len(kept) == site.units
        # within a site no unit that left is better than one that stays
        gone = np.setdiff1d(np.arange(site.units), kept)
        if len(gone):
            assert saliency[site.name][gone].max() <= saliency[site.name][kept].min()


def expert_sites():
    """One layer of one KV group and two experts of four neurons each, one weight a neuron."""
    slot = Slot("up", 0, 1, 1)
    experts = [Site(f"layers.0.experts.{e}.mlp_neuron", "mlp", 0, 4, (slot,), "layers.0.mlp_neuron") for e in range(2)]
    return (Site("layers.0.kv_group", "attention", 0, 1, (slot,)), *experts)


def test_experts_of_a_layer_keep_equally_many_by_hand():
    """Expert 0's neurons matter a lot more, yet both lose two: 4 of 9 weights leave, each expert keeps its own best."""
    sites = expert_sites()
    saliency = {
        "layers.0.kv_group": np.array([1.0], dtype=np.float32),
        "layers.0.experts.0.mlp_neuron": np.array([90, 70, 80, 60], dtype=np.float32),
        "layers.0.experts.1.mlp_neuron": np.array([1, 4, 2, 3], dtype=np.float32),
    }
    keep = allocate(sites, saliency, Allocation(4 / 9, gamma=1e9, round_to=1))
    assert keep["layers.0.experts.0.mlp_neuron"].tolist() == [0, 2]
    assert keep["layers.0.experts.1.mlp_neuron"].tolist() == [1, 3]


def test_uniform_scope_aligns_what_a_stock_checkpoint_shares():
    """Two layers that share a table: separately they would keep heads 0 and 1, together they keep 1 (3+1 < 2+4)."""
    sites = tuple(
        site if site.module == "mlp" else replace(site, aligned_with="encoder") for site in make_sites(neurons=8)
    )
    saliency = ascending(sites)
    saliency["layers.0.kv_group"] = np.array([3.0, 2.0], dtype=np.float32)
    saliency["layers.1.kv_group"] = np.array([1.0, 4.0], dtype=np.float32)
    aligned = allocate(sites, saliency, Allocation(0.5, gamma=1.0, round_to=2, scope="uniform"))
    assert aligned["layers.0.kv_group"].tolist() == aligned["layers.1.kv_group"].tolist() == [1]
    apart = allocate(make_sites(neurons=8), saliency, Allocation(0.5, gamma=1.0, round_to=2, scope="uniform"))
    assert [apart[f"layers.{layer}.kv_group"].tolist() for layer in range(2)] == [[0], [1]]


def test_joint_by_hand():
    """One list by saliency a weight: groups of 12 weights at 1/12 each, neurons of 3 weights.

    2 layers, A = M = 48, r = 0.25: 24 weights leave. Neurons score 0.3 (0.1 a weight) or 30 (10 a weight): the four of
    0.1 come after the groups of 1/12. One group a layer is protected, so one group a layer leaves: 24 weights.
    """
    sites = make_sites()
    saliency = {site.name: np.full(site.units, 1.0, np.float32) for site in sites if site.module == "attention"}
    saliency["layers.0.kv_group"][1] = saliency["layers.1.kv_group"][0] = 50
    saliency |= {
        f"layers.{layer}.mlp_neuron": np.array([0.3, 0.3, 30, 30, 30, 30, 30, 30], np.float32) for layer in range(2)
    }
    keep = allocate(sites, saliency, Allocation(0.25, gamma=1.0, round_to=2, ranking="joint"))
    assert [keep[f"layers.{layer}.kv_group"].tolist() for layer in range(2)] == [[1], [0]]
    assert [len(keep[f"layers.{layer}.mlp_neuron"]) for layer in range(2)] == [8, 8]
    # 12 weights more: the four cheap neurons
    keep = allocate(sites, saliency, Allocation(0.375, gamma=1.0, round_to=2, ranking="joint"))
    assert [keep[f"layers.{layer}.mlp_neuron"].tolist() for layer in range(2)] == [[2, 3, 4, 5, 6, 7]] * 2
    # counted twice, the groups are worth 1/6 a weight: the cheap neurons leave first
    keep = allocate(sites, saliency, Allocation(0.125, gamma=1.0, round_to=2, ranking="joint", attention_factor=2.0))
    assert [len(keep[f"layers.{layer}.kv_group"]) for layer in range(2)] == [2, 2]
    assert [keep[f"layers.{layer}.mlp_neuron"].tolist() for layer in range(2)] == [[2, 3, 4, 5, 6, 7]] * 2


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_odd_attention_factors_are_refused(factor):
    sites = make_sites()
    with pytest.raises(InputError, match="attention_factor: expected a finite number above 0"):
        allocate(sites, ascending(sites), Allocation(0.2, gamma=1.0, ranking="joint", attention_factor=factor))


def test_joint_does_not_read_gamma():
    sites = make_sites(layers=3, groups=4, neurons=16)
    asked = (Allocation(0.4, gamma=gamma, round_to=2, ranking="joint") for gamma in (0.1, 10.0))
    few, many = (allocate(sites, ascending(sites), each) for each in asked)
    assert all(np.array_equal(few[name], kept) for name, kept in many.items())


@given(st.integers(0, 10_000), st.floats(0.0, 0.6), st.sampled_from(["global", "uniform"]))
@settings(deadline=None, max_examples=60)
def test_joint_meets_the_ratio(seed, pruning_ratio, scope):
    """Whatever the saliency: within one block of one layer (of every layer, for uniform), one group and block stay."""
    sites = make_sites(layers=4, groups=4, neurons=64, group_weights=48, neuron_weights=3)
    generator = np.random.default_rng(seed)
    saliency = {site.name: generator.lognormal(size=site.units).astype(np.float32) for site in sites}
    keep = allocate(sites, saliency, Allocation(pruning_ratio, gamma=1.0, round_to=4, scope=scope, ranking="joint"))
    total = sum(site.weights for site in sites)
    block = 4 * 3 * (4 if scope == "uniform" else 1)
    assert abs(ratio(sites, keep) - pruning_ratio) * total <= block + 1e-6
    for site in sites:
        assert len(keep[site.name]) >= (1 if site.module == "attention" else 4)
        worst = saliency[site.name][keep[site.name]].min()
        gone = np.delete(saliency[site.name], keep[site.name])
        assert not len(gone) or gone.max() <= worst


def test_joint_has_no_published_rule():
    sites = make_sites()
    with pytest.raises(InputError, match="expected rule exact with ranking joint, got published"):
        allocate(sites, ascending(sites), Allocation(0.2, gamma=1.0, rule="published", ranking="joint"))
