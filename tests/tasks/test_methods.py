"""Every unit method goes through the pipeline: what it keeps is what its scorer and its allocation say."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import random_ids, save_family, tiny_llama

from nirvana.allocation import Allocation, allocate
from nirvana.architectures.site import Site, Slot
from nirvana.errors import InputError
from nirvana.loading import load_model
from nirvana.methods.method import Scoring
from nirvana.methods.registry import METHODS
from nirvana.plan import Plan
from nirvana.walk import Stack
from tasks import aggregate_saliency, collect_gradients, prune, score_pool
from tasks import allocate as allocate_step
from tasks.params import load_params, parse_params
from tasks.registry import step
from tasks.unit_saliency import allocate_as_asked
from tasks.workers.candidates import CACHE

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def params_of(method, **changes):
    """The shipped params.yaml with a method's name alone, as `dvc exp run -S saliency.method=...` gives it."""
    from ruamel.yaml import YAML

    values = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    values["saliency"]["method"] = method
    values["calibration"] |= {"pool_size": 2, "sequences": 2, "sequence_length": 16, "seed": 3}
    values["compute"]["threads"] = 1
    values["runtime"] |= {"device": "cpu", "workers": 1}
    for section, keys in changes.items():
        values[section] |= keys
    return parse_params(values)


def run_pipeline(method, model, root):
    """Run the steps from scores to checkpoint; return the candidates' ids and where everything is."""
    params = params_of(method, allocation={"pruning_ratio": 0.3, "round_to": 4})
    ids = [random_ids(2, 16, seed=seed) for seed in (1, 2)]
    save_file({"input_ids": torch.stack(ids)}, root / "candidates.safetensors")
    save_file({"input_ids": random_ids(2, 16, seed=9)}, root / "heldout.safetensors")
    at = {
        "model": model,
        **{name: root / f"{name}.safetensors" for name in ("candidates", "heldout", "compensation_ids")},
        **{name: root / name for name in ("channel_saliency", "unit_saliency", "checkpoint")},
        "kl_scores": root / "kl.csv",
        **{name: root / f"{name}.json" for name in ("selection", "plan", "divergence")},
        "allocation": root / "allocation.csv",
    }
    save_file({"input_ids": torch.zeros((0, 16), dtype=torch.int64)}, at["compensation_ids"])
    for module in (collect_gradients, aggregate_saliency, score_pool, allocate_step, prune):
        module.run(params, at, at)
    return params, ids, at


@pytest.mark.parametrize("name", METHODS)
def test_the_pipeline_keeps_what_scorer_and_allocation_say(name, tmp_path):
    model = tiny_llama(tmp_path / "model", num_hidden_layers=4, intermediate_size=64)
    params, ids, at = run_pipeline(name, model, tmp_path)
    method, stack = METHODS[name], Stack.open(model)
    selected = json.loads(at["selection"].read_text())["selected"]
    saliency = method.scorer(stack, ids[selected], Scoring(params.saliency.microbatch, 3, params.saliency.draws))
    sites = stack.architecture.sites()
    asked = method.allocation(0.3, round_to=4)
    expected = allocate(
        sites, {site: values.numpy() for site, values in saliency.items()}, asked, per_weight=method.per_weight
    )
    plan = Plan.read(at["plan"])
    assert asdict(plan.allocation) == asdict(asked) and plan.parameters["method"] == name
    assert all(np.array_equal(plan.keep[site], kept) for site, kept in expected.items())
    assert abs(plan.achieved_ratio["total"] - 0.3) < 0.1
    assert load_model(at["checkpoint"])(ids[0][:1]).logits.isfinite().all()
    assert list(CACHE.iterdir()) == []


@pytest.mark.parametrize("kv_heads", [4, 8])
@pytest.mark.parametrize("name", METHODS)
def test_what_a_stock_configuration_could_say_binds_scope_uniform_alone(name, kv_heads, tmp_path):
    """Of 8 KV groups a stock checkpoint cannot keep 5; a pruned one can."""
    model = tiny_llama(
        tmp_path / "model", num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=kv_heads, head_dim=8
    )
    stack, method = Stack.open(model), METHODS[name]
    sites = stack.architecture.sites()
    saliency = method.scorer(stack, random_ids(2, 16), Scoring(2, 3))
    saliency = {site: values.numpy() for site, values in saliency.items()}
    for ratio in (0.3, 0.4):
        expected = allocate(sites, saliency, method.allocation(ratio), per_weight=method.per_weight)
        found = allocate_as_asked(stack.architecture, saliency, params_of(name, allocation={"pruning_ratio": ratio}))
        assert all(np.array_equal(found[site], kept) for site, kept in expected.items())


def test_protected_layers_beyond_the_depth_are_refused():
    sites = [
        Site(f"layers.{layer}.{kind}", module, layer, 16, (Slot(f"{layer}.{kind}", 0, 1, 8),))
        for layer in range(8)
        for kind, module in (("kv_group", "attention"), ("mlp_neuron", "mlp"))
    ]
    saliency = {site.name: np.arange(16, dtype=np.float32) for site in sites}
    for protected in ((0, 33), (0, 40), (0, 60), (40, 0), (20, 20)):
        with pytest.raises(InputError, match="layers beside the"):
            allocate(sites, saliency, Allocation(0.1, protected_layers=protected))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_brings_its_own_allocation(name):
    params = params_of(name)
    method = METHODS[name]
    assert params.allocation.ranking == method.ranking
    assert params.allocation.gamma == method.gamma
    assert params.allocation.attention_factor == method.attention_factor
    assert params.allocation.protected_layers == method.protected_layers


def test_what_is_spelt_out_overrules_the_method():
    asked = params_of("llm_pruner", allocation={"ranking": "modules", "gamma": 2.0, "protected_layers": [0, 0]})
    assert replace(asked.allocation, pruning_ratio=0.5).ranking == "modules"
    assert (asked.allocation.gamma, asked.allocation.protected_layers) == (2.0, (0, 0))


def test_fused_experts_are_refused_by_methods_that_read_their_inputs(tmp_path):
    model = save_family("qwen3_moe", tmp_path / "model")
    for name in ("flap", "wanda_sp", "fisher"):
        with pytest.raises(InputError, match="output"):
            collect_gradients._expected_sizes(model, METHODS[name])
    assert collect_gradients._expected_sizes(model, METHODS["llm_pruner"])


def test_a_methods_code_is_a_dependency_of_what_scores():
    from tasks.provenance.code_files import code_files

    files = code_files(step("collect_gradients").module, ROOT)
    assert {f"nirvana/methods/{name}.py" for name in METHODS} <= set(files)


def test_the_shipped_experiment_is_the_published_method():
    allocation = load_params(ROOT / "params.yaml").allocation
    assert (allocation.ranking, allocation.gamma, allocation.protected_layers) == ("modules", 3.36, (0, 0))
