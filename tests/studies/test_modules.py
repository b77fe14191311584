"""Pruning by module: the other one stays whole, the total is the same, and what cannot be reached is said."""

import math

import numpy as np
import pytest
from sweeps import counted, made_row, tiny_comparison
from tiny import tiny_llama

from nirvana.allocation import achieved_ratio, allocate
from nirvana.architectures.site import Site, Slot
from nirvana.errors import InputError
from nirvana.walk import Stack
from studies.sweep.cells import UNREACHABLE
from studies.sweep.modules import Settings, cells_of, children, keep_elsewhere, measure, tables, verdict
from studies.sweep.pictures import draw_modules


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 256, "num_hidden_layers": 3}
    return tiny_llama(tmp_path_factory.mktemp("modules") / "model", **shape)


@pytest.fixture
def comparison(model_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny_comparison(model_directory)


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
    expected = allocate(sites, saliency, 0.3, gamma=1e9)
    assert all(np.array_equal(keep[name], expected[name]) for name in expected)
    assert all(len(keep[each.name]) % 8 == 0 for each in sites if each.module == "mlp")


@pytest.mark.parametrize(("module", "most"), [("attention", "0.2"), ("mlp", "0.63")])
def test_a_module_that_is_too_small_says_what_it_could_give(module, most):
    """Four groups of 10 and eighteen neurons of 7, of 200."""
    with pytest.raises(InputError, match=f"cannot be reached in {module} alone: at most {most} of"):
        keep_elsewhere(SITES, SALIENCY, module, 0.64, round_to=1)


def test_rows_prune_where_they_say_and_nothing_twice(comparison, monkeypatch):
    settings = Settings(("nirvana", "fisher"), (0.05, 0.5))
    with counted(monkeypatch) as calls:
        rows = measure(comparison, settings)
    by = {(row["method"], row["ratio"], row["where"]): row for row in rows}
    assert len(by) == 1 + 2 * 2 * 3
    for name in settings.methods:
        for ratio, where, whole in ((0.05, "attention", "mlp"), (0.05, "mlp", "attention"), (0.5, "mlp", "attention")):
            row = by[name, ratio, where]
            assert row["achieved_by_module"][whole] == 0
            assert row["achieved_ratio"] == pytest.approx(ratio, abs=0.025)  # one KV group is 0.016 of all
        assert "in attention alone" in by[name, 0.5, "attention"][UNREACHABLE]
    both = comparison.row("fisher", 0.5)
    assert by["fisher", 0.5, "both"]["losses"] == both["losses"]
    assert len(calls) == 1 + 2 * 5
    again = tiny_comparison(comparison.model_directory)
    with counted(monkeypatch) as calls:
        assert measure(again, settings) == rows
    assert calls == []


def test_the_judged_model_is_the_one_that_was_chosen(comparison):
    """The row's own count of parameters and rates, from the units that stay."""
    (row,) = (r for r in measure(comparison, Settings(("nirvana",), (0.05,))) if r.get("where") == "attention")
    sites = comparison.stack.architecture.sites()
    from studies.methods import method_named

    saliency = comparison.scores(method_named("nirvana")).saliency
    keep = keep_elsewhere(sites, saliency, "attention", 0.05)
    rates = achieved_ratio(sites, {name: len(kept) for name, kept in keep.items()})
    assert row["achieved_ratio"] == rates["total"] and row["achieved_by_module"]["attention"] == rates["attention"]
    removed = sum((each.units - len(keep[each.name])) * each.weights_per_unit for each in sites)
    assert comparison.dense()["parameters"] - row["parameters"] == removed


@pytest.mark.parametrize("name", ["wanda_sp", "llm_pruner", "flop"])
def test_a_method_that_ranks_otherwise_is_refused(name, comparison):
    with pytest.raises(InputError, match=r"ranks the units of all layers together|got 'flop'"):
        measure(comparison, Settings((name,), (0.05,)))


# --- what came out --------------------------------------------------------------------------------------------


ROWS = [
    made_row("dense", 0.0, 2.0, where=""),
    made_row("fisher", 0.1, 3.0, where="mlp"),
    made_row("fisher", 0.1, 4.0, where="attention"),
    made_row("fisher", 0.1, 3.5, where="both"),
    made_row("fisher", 0.2, 5.0, where="mlp"),
    {"method": "fisher", "ratio": 0.2, "where": "attention", UNREACHABLE: "at most 0.16"},
    made_row("fisher", 0.2, 5.0, where="both"),
]


def test_verdict_and_table():
    cells = cells_of(ROWS)
    first, second = verdict(cells)
    assert first.startswith(f"fisher at 0.1: MLP only costs least, perplexity {math.exp(3):.2f}")
    assert f"attention only {math.exp(4):.2f}" in first and "surely better (-0.500 nats" in first
    assert second.startswith("fisher at 0.2: both costs least") and "attention only cannot reach it" in second
    ((title, table),) = tables(cells).items()
    assert title.startswith("fisher") and table[5][:3] == ["0.2 attention", "", "unreachable"]
    assert table[3][2] == "the reference"
    assert children(cells)["fisher, MLP only"][1].points == [
        (100, pytest.approx(math.exp(3))),
        (200, pytest.approx(math.exp(5))),
    ]


def test_picture(tmp_path):
    png, svg = draw_modules(cells_of(ROWS), math.exp(2), tmp_path / "modules.png")
    assert png.stat().st_size > 20_000
    words = ("Fisher saliency: perplexity", "MLP only", "attention only", "both", "attention alone cannot reach 0.2")
    assert all(word in svg.read_text() for word in words)
