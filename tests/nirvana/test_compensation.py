"""Compensation against hand-made redundancy, ordinary least squares, and the identity that its target implies."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import all_families, ids_for, masked_dense, random_ids, random_keep, save_family

from nirvana.compensation import compensate
from nirvana.divergence import kl_divergence
from nirvana.errors import InputError
from nirvana.walk import Stack, final_hidden_states

WITH_PROJECTIONS = [name for name in all_families() if name != "qwen3_moe"]
OWN_TARGET = [name for name in WITH_PROJECTIONS if name.startswith("gemma3")]


def test_a_twin_takes_over(tmp_path):
    """Neuron 1 repeats neuron 0. Without it, neuron 0's column has to become the sum of both."""
    path = save_family("llama", tmp_path)
    (file,) = path.glob("*.safetensors")
    parameters = load_file(file)
    for layer in range(3):
        for matrix in ("gate_proj", "up_proj"):
            parameters[f"model.layers.{layer}.mlp.{matrix}.weight"][1] = parameters[
                f"model.layers.{layer}.mlp.{matrix}.weight"
            ][0]
    save_file(parameters, file, {"format": "pt"})
    stack, ids = Stack.open(path), random_ids(20, 16)
    keep = {site.name: np.arange(site.units) for site in stack.architecture.sites()}
    keep |= {f"layers.{layer}.mlp_neuron": np.delete(np.arange(48), 1) for layer in range(3)}
    updates = dict(compensate(stack, keep, ids, ridge=1e-9))
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        dense = parameters[name]
        expected = torch.cat([dense[:, :1] + dense[:, 1:2], dense[:, 2:]], dim=1)
        torch.testing.assert_close(updates[name], expected, rtol=1e-3, atol=1e-3)
    dense = final_hidden_states(stack, ids)
    assert kl_divergence(stack, keep, ids, dense) > 1e-3
    assert kl_divergence(stack, keep, ids, dense, updates) < 1e-7


@pytest.mark.parametrize("name", [name for name in WITH_PROJECTIONS if name not in OWN_TARGET])
def test_fewer_tokens_than_columns_restore_the_dense_stream(name, tmp_path):
    """With more kept columns than tokens the fit is exact: whatever was lost, the streams become the dense ones."""
    stack, ids = Stack.open(save_family(name, tmp_path)), ids_for(name, 1, 7)
    keep = random_keep(stack.architecture.sites())
    updates = dict(compensate(stack, keep, ids, ridge=1e-6))
    dense = final_hidden_states(stack, ids)
    assert not torch.allclose(final_hidden_states(stack, ids, keep), dense, atol=0.1)
    torch.testing.assert_close(final_hidden_states(stack, ids, keep, updates), dense, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("name", WITH_PROJECTIONS)
def test_helps_on_the_text_it_was_fitted_on(name, tmp_path):
    stack, ids = Stack.open(save_family(name, tmp_path)), ids_for(name, 16, 16)
    keep = random_keep(stack.architecture.sites(), share=0.8)
    dense = final_hidden_states(stack, ids)
    updates = dict(compensate(stack, keep, ids, ridge=0.01))
    assert kl_divergence(stack, keep, ids, dense, updates) < 0.9 * kl_divergence(stack, keep, ids, dense)


def test_equals_ordinary_ridge_regression(tmp_path):
    """The first projection of the model: its inputs come from masked dense layers, its target is the dense output."""
    path = save_family("llama-mha", tmp_path)
    stack, ids = Stack.open(path), random_ids(12, 16)
    keep = random_keep(stack.architecture.sites())
    name, ridge = "model.layers.0.self_attn.o_proj.weight", 0.1
    found = dict(compensate(stack, keep, ids, ridge))[name]
    seen = {}
    everything = {site.name: np.arange(site.units) for site in stack.architecture.sites()}
    for kind, kept in (("dense", everything), ("pruned", keep)):
        model = masked_dense(path, kept)
        model.model.layers[0].self_attn.o_proj.register_forward_hook(
            lambda module, arguments, output, kind=kind: seen.__setitem__(kind, (arguments[0], output))
        )
        with torch.no_grad():
            model(ids)
    columns = np.concatenate([np.arange(unit * 8, unit * 8 + 8) for unit in keep["layers.0.kv_group"]])
    x = seen["pruned"][0].flatten(0, 1).double().numpy()[:, columns]
    missing = (seen["dense"][1] - seen["pruned"][1]).flatten(0, 1).double().numpy()
    weight = stack.parameter(name).double().numpy()[:, columns]
    penalty = np.sqrt(ridge * np.mean(np.square(x).sum(axis=0)))
    rows = np.concatenate([x, penalty * np.eye(len(columns))])
    change, *_ = np.linalg.lstsq(rows, np.concatenate([missing, np.zeros((len(columns), 32))]), rcond=None)
    np.testing.assert_allclose(found.numpy(), weight + change.T, rtol=1e-3, atol=1e-5)


def test_a_strong_ridge_changes_nothing(tmp_path):
    stack, ids = Stack.open(save_family("qwen3", tmp_path)), random_ids(4, 12)
    keep = random_keep(stack.architecture.sites())
    plain = final_hidden_states(stack, ids, keep)
    updates = dict(compensate(stack, keep, ids, ridge=1e9))
    torch.testing.assert_close(final_hidden_states(stack, ids, keep, updates), plain, rtol=1e-4, atol=1e-4)


def test_streamed_equals_resident(tmp_path):
    path, ids = save_family("llama", tmp_path), random_ids(6, 12)
    keep = random_keep(Stack.open(path).architecture.sites())
    resident, streamed = (
        dict(compensate(Stack.open(path, execution=way), keep, ids)) for way in ("resident", "streamed")
    )
    assert resident.keys() == streamed.keys()
    assert all(torch.equal(streamed[name], matrix) for name, matrix in resident.items())


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan"), float("inf")])
def test_odd_ridges_are_refused(ridge, tmp_path):
    stack = Stack.open(save_family("llama", tmp_path))
    keep = random_keep(stack.architecture.sites())
    with pytest.raises(InputError, match="ridge: expected a finite number above 0"):
        next(compensate(stack, keep, random_ids(2, 8), ridge))


def test_the_gain_shrinks_what_became_noise(tmp_path):
    """With neurons gone the streams differ from the dense ones; the fitted gain brings what the head reads nearer."""
    stack, ids = Stack.open(save_family("llama", tmp_path)), random_ids(640, 16)
    keep = random_keep(stack.architecture.sites(), share=0.5)
    updates = dict(compensate(stack, keep, ids))
    gain = updates["model.norm.weight"] / stack.parameter("model.norm.weight")
    assert 0.3 < gain.mean() < 1
    fresh = random_ids(64, 16, seed=9)
    dense = final_hidden_states(stack, fresh)
    without = {name: values for name, values in updates.items() if name != "model.norm.weight"}
    distances = [(final_hidden_states(stack, fresh, keep, each) - dense).norm() for each in (updates, without)]
    assert distances[0] < distances[1]


def test_the_gain_is_a_regression_through_the_origin(tmp_path):
    """Gemma's norm multiplies by 1 + weight: the factor is on the sum."""
    stack, ids = Stack.open(save_family("gemma3_text", tmp_path)), random_ids(640, 16)
    keep = random_keep(stack.architecture.sites(), share=0.8)
    updates = dict(compensate(stack, keep, ids))
    without = {name: values for name, values in updates.items() if name != "model.norm.weight"}
    apart = torch.cat([ids[448:512]])  # the eighth of ten microbatches of 64 sequences
    goal, given = final_hidden_states(stack, apart), final_hidden_states(stack, apart, keep, without)
    factor = (goal * given).sum() / given.square().sum()
    before = stack.parameter("model.norm.weight")
    torch.testing.assert_close(updates["model.norm.weight"], (1 + before) * factor - 1, rtol=1e-3, atol=1e-4)
