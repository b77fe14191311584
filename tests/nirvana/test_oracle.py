"""What the authors' own code keeps, on the real model (../shared/oracle; skipped where it is absent)."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from real_model import real_model
from transformers import AutoModelForCausalLM

from nirvana.allocation import Allocation, allocate
from nirvana.divergence import kl_divergence
from nirvana.perplexity import token_perplexity
from nirvana.plan import Plan
from nirvana.saliency import channel_saliency, unit_saliency
from nirvana.surgery import prune
from nirvana.walk import Stack, final_hidden_states
from nirvana.weights import model_digest

ORACLE = Path(__file__).parents[3] / "shared" / "oracle"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ORACLE.is_dir(), reason="the oracle folder ../shared/oracle is not here"),
]


def token_ids(name):
    return torch.tensor(json.loads((ORACLE / f"{name}.json").read_text()))


@pytest.fixture(scope="module", autouse=True)
def both_cores():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def expected():
    return json.loads((ORACLE / "expected_ratio_0.4_gamma_3.36.json").read_text())


@pytest.fixture(scope="module")
def stack():
    return Stack.open(real_model())


@functools.cache
def _saliency():
    return channel_saliency(Stack.open(real_model()), token_ids("calibration_ids"), microbatch=4)


@pytest.fixture(scope="module")
def keep(stack):
    saliency = {k: v.numpy() for k, v in unit_saliency(stack.architecture.sites(), _saliency().sums).items()}
    return allocate(stack.architecture.sites(), saliency, Allocation(0.4, gamma=3.36, round_to=8, rule="published"))


def test_objective():
    assert _saliency().objective == pytest.approx(19.0960, abs=2e-4)


def test_same_kv_groups(keep, expected):
    kept = [keep[f"layers.{layer}.kv_group"].tolist() for layer in range(30)]
    assert kept == expected["kept_kv_groups"]


def test_same_neurons_but_for_one_in_a_thousand(keep, expected):
    differing = sum(
        len(np.setxor1d(keep[f"layers.{layer}.mlp_neuron"], kept))
        for layer, kept in enumerate(expected["kept_mlp_neurons"])
    )
    assert differing <= 0.001 * sum(len(kept) for kept in expected["kept_mlp_neurons"])


def test_kl_divergence(stack, keep):
    ids = token_ids("heldout_ids")
    value = kl_divergence(stack, keep, ids, final_hidden_states(stack, ids))
    assert value == pytest.approx(1.586, rel=0.01)


def test_pruned_model_on_the_evaluation_ids(stack, keep, tmp_path, expected):
    sites = stack.architecture.sites()
    plan = Plan.build(
        sites,
        keep,
        model_digest=model_digest(real_model()),
        model_type="llama",
        calibration_digest="sha256:oracle",
        allocation=Allocation(0.4),
    )
    prune(real_model(), plan, tmp_path / "pruned")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    assert loaded.num_parameters() == expected["parameters_pruned"]
    pruned, windows = Stack.open(tmp_path / "pruned"), token_ids("evaluation_ids")
    assert token_perplexity(pruned, windows[:16], windows[:16, 1:]) == pytest.approx(172.8, rel=0.01)
    assert token_perplexity(pruned, windows, windows[:, 1:]) == pytest.approx(205.0, rel=0.01)


def test_dense_model_on_the_evaluation_ids(stack):
    windows = token_ids("evaluation_ids")
    assert token_perplexity(stack, windows[:16], windows[:16, 1:]) == pytest.approx(50.8, rel=0.01)
    assert token_perplexity(stack, windows, windows[:, 1:]) == pytest.approx(54.7, rel=0.01)
