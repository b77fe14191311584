"""Rivals: hand-computed scores, a full-autograd reference, and for ShortGPT the dense model with layers skipped."""

import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    all_families,
    family_configs,
    ids_for,
    logits_of,
    one_layout_each,
    random_ids,
    random_keep,
    save_family,
    t5_configs,
    tiny_llama,
)
from torch.nn import functional

from nirvana.allocation import Allocation, achieved_ratio, allocate, protected_layers
from nirvana.errors import InputError
from nirvana.head import head_loss
from nirvana.input_statistics import InputStatistics, input_statistics
from nirvana.loading import load_model
from nirvana.methods.flap import bias_compensation
from nirvana.methods.flap import scores_from as flap_scores
from nirvana.methods.llm_pruner import llm_pruner
from nirvana.methods.magnitude import magnitude
from nirvana.methods.method import Scoring
from nirvana.methods.random import random
from nirvana.methods.registry import METHODS
from nirvana.methods.shortgpt import RECORD_NAME, block_influence, layers_to_remove, write_shortgpt
from nirvana.methods.wanda_sp import scores_from as wanda_scores
from nirvana.objective import next_token_loss
from nirvana.saliency import channel_key, channel_saliency
from nirvana.walk import Stack

# -- next-token loss ---------------------------------------------------------------------------------------------------


def naive_loss(logits, ids):
    read = ids[-1] if isinstance(ids, tuple) else ids
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), read[:, 1:].flatten())


# experts that run as one tensor: test_saliency has that translation
@pytest.mark.parametrize("name", [name for name in all_families() if name != "qwen3_moe"])
def test_lm_loss_equals_full_autograd(name, tmp_path):
    save_family(name, tmp_path)
    stack, ids = Stack.open(tmp_path), ids_for(name, 5, 12)
    model = load_model(tmp_path)
    loss = naive_loss(logits_of(model, ids), ids)
    loss.backward()
    saliency = {n: (p * p.grad).abs().detach() for n, p in model.named_parameters() if p.grad is not None}
    result = channel_saliency(stack, ids, microbatch=2, objective=next_token_loss)
    assert result.objective == pytest.approx(loss.item(), rel=1e-5)
    rtol = 1e-3 if name.startswith("t5") else 1e-4  # see test_saliency
    for site in stack.architecture.sites():
        for slot in site.weight_slots:
            expected = saliency[slot.parameter].sum(dim=1 - slot.dim)
            torch.testing.assert_close(
                result.sums[channel_key(slot)], expected, rtol=rtol, atol=1e-6 * float(expected.max())
            )


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("vocab_chunk", [2, 3, 7, 100])
def test_loss_and_gradient_of_the_head(vocab_chunk, softcap):
    generator = torch.Generator().manual_seed(0)
    hidden = (20 * torch.randn(6, 4, generator=generator)).requires_grad_()  # far apart: running maxima matter
    head, targets = torch.randn(7, 4, generator=generator), torch.tensor([0, 6, 3, 3, 1, 5])
    logits = hidden @ head.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    loss = functional.cross_entropy(logits, targets, reduction="sum")
    loss.backward()
    value, gradient = head_loss(hidden.detach(), targets, head, vocab_chunk, softcap)
    assert value == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(gradient, hidden.grad, rtol=1e-4, atol=1e-5)


def test_loss_of_the_head_by_hand():
    """Two tokens, logits ln 3 and 0: probabilities 3/4 and 1/4."""
    hidden, head = torch.tensor([[np.log(3.0)]], dtype=torch.float32), torch.tensor([[1.0], [0.0]])
    value, gradient = head_loss(hidden, torch.tensor([1]), head, vocab_chunk=1)
    assert value == pytest.approx(np.log(4.0))
    assert gradient.item() == pytest.approx(0.75)


def test_one_token_predicts_nothing(tmp_path):
    stack = Stack.open(save_family("llama", tmp_path))
    with pytest.raises(InputError, match="at least 2 tokens, got 1"):
        channel_saliency(stack, random_ids(2, 1), objective=next_token_loss)


# -- statistics of inputs ----------------------------------------------------------------------------------------------

FUSED = "qwen3_moe"


@pytest.mark.parametrize("name", [name for name in one_layout_each() if name != FUSED])
def test_statistics_equal_those_of_the_whole_model(name, tmp_path):
    save_family(name, tmp_path)
    stack, ids = Stack.open(tmp_path), ids_for(name, 5, 12)
    model, seen = load_model(tmp_path), {}
    result = input_statistics(stack, ids)
    for parameter in result.mean:
        module = model.get_submodule(parameter.removesuffix(".weight"))
        module.register_forward_hook(lambda m, x, y, key=parameter: seen.update({key: x[0].flatten(0, 1).double()}))
    with torch.no_grad():
        logits_of(model, ids)
    columns = {s.parameter for site in stack.architecture.sites() for s in site.weight_slots if s.dim == 1}
    assert result.mean.keys() == result.second_moment.keys() == columns
    for parameter, inputs in seen.items():
        scale = float(inputs.abs().max())
        torch.testing.assert_close(result.mean[parameter], inputs.mean(dim=0), rtol=1e-4, atol=1e-6 * scale)
        variance = inputs.var(dim=0, correction=0)
        torch.testing.assert_close(result.variance(parameter), variance, rtol=1e-3, atol=1e-6 * scale**2)


def test_statistics_do_not_depend_on_execution(tmp_path):
    save_family("llama", tmp_path)
    resident, streamed = (
        input_statistics(Stack.open(tmp_path, execution=execution), random_ids(3, 9))
        for execution in ("resident", "streamed")
    )
    for parameter, mean in resident.mean.items():
        assert torch.equal(mean, streamed.mean[parameter])
        assert torch.equal(resident.second_moment[parameter], streamed.second_moment[parameter])


@pytest.mark.parametrize("method", ["wanda_sp", "flap"])
def test_fused_experts_are_refused(method, tmp_path):
    stack = Stack.open(save_family(FUSED, tmp_path))
    with pytest.raises(InputError, match="expected an output projection that is a module of its own"):
        METHODS[method].scorer(stack, random_ids(2, 5), Scoring())


# -- scores by hand: 2 KV groups of 2 query heads, head_dim 8; 64 neurons; hidden 32 -----------------------------------

O_PROJ, DOWN = "model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight"


def with_output_projections(path, attention, neurons):
    """Return a stack of one layer whose output projections have these values a column in all 32 rows."""
    tiny_llama(path, num_hidden_layers=1)
    weights = load_file(path / "model.safetensors")
    weights[O_PROJ] = attention.expand(32, 32).contiguous()
    weights[DOWN] = neurons.expand(32, 64).contiguous()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return Stack.open(path)


def statistics(mean, second_moment):
    as_double = [{key: value.double() for key, value in each.items()} for each in (mean, second_moment)]
    return InputStatistics(*as_double)


def test_wanda_sp_by_hand(tmp_path):
    stack = with_output_projections(tmp_path, torch.ones(32), -torch.arange(64.0))
    second = {O_PROJ: torch.tensor([9.0] * 16 + [4.0] * 16), DOWN: torch.full((64,), 25.0)}
    scores = wanda_scores(stack, statistics(second, second))
    assert scores["layers.0.kv_group"].tolist() == [16 * 3.0, 16 * 2.0]
    torch.testing.assert_close(scores["layers.0.mlp_neuron"], 5 * torch.arange(64.0))


def test_flap_by_hand(tmp_path):
    """Neurons alternate between variance 0 and 1; group 0 has columns of variance 1 and 3, group 1 of 2.

    Squared as in attention, 32²·(1, 9 | 4): mean 4.5, the groups' means 0.5 above and below; unsquared they would tie.
    """
    stack = with_output_projections(tmp_path, torch.ones(32), torch.ones(64))
    mean = {O_PROJ: torch.full((32,), 2.0), DOWN: torch.full((64,), 3.0)}
    variance = {
        O_PROJ: torch.tensor([1.0] * 8 + [3.0] * 8 + [2.0] * 16),
        DOWN: torch.tensor([0.0, 1.0] * 32),
    }
    scores = flap_scores(stack, statistics(mean, {key: variance[key] + mean[key] ** 2 for key in mean}))
    spread = ((8 * 3.5**2 + 8 * 4.5**2 + 16 * 0.5**2) / 31) ** 0.5
    torch.testing.assert_close(scores["layers.0.kv_group"], torch.tensor([0.5, -0.5]) / spread)
    spread = (64 * 0.25 / 63) ** 0.5
    torch.testing.assert_close(scores["layers.0.mlp_neuron"][:2], torch.tensor([-0.5, 0.5]) / spread)


def test_flap_where_nothing_differs(tmp_path):
    stack = with_output_projections(tmp_path, torch.ones(32), torch.ones(64))
    same = {O_PROJ: torch.ones(32), DOWN: torch.ones(64)}
    assert all(torch.equal(s, torch.zeros_like(s)) for s in flap_scores(stack, statistics(same, same)).values())


def test_bias_compensation_by_hand(tmp_path):
    stack = with_output_projections(tmp_path, torch.arange(32.0), torch.ones(64))
    mean = {O_PROJ: torch.ones(32), DOWN: torch.arange(64.0)}
    keep = {"layers.0.kv_group": np.array([0]), "layers.0.mlp_neuron": np.arange(3, 64)}
    biases = bias_compensation(stack, keep, statistics(mean, mean))
    assert biases.keys() == {O_PROJ.replace("weight", "bias"), DOWN.replace("weight", "bias")}
    assert biases[O_PROJ.replace("weight", "bias")].tolist() == [float(sum(range(16, 32)))] * 32
    assert biases[DOWN.replace("weight", "bias")].tolist() == [0.0 + 1 + 2] * 32
    everything = {site.name: np.arange(site.units) for site in stack.architecture.sites()}
    assert bias_compensation(stack, everything, statistics(mean, mean)) == {}


def test_bias_compensation_restores_an_input_that_does_not_vary(tmp_path):
    """One token: its inputs are their own mean, so the first attention loses nothing but position by position."""
    save_family("llama-untied-biases", tmp_path)
    stack, ids = Stack.open(tmp_path), random_ids(1, 1)
    keep = random_keep(stack.architecture.sites())
    result = input_statistics(stack, ids)
    bias = bias_compensation(stack, keep, result)[O_PROJ.replace("weight", "bias")]
    weight, own = (stack.parameter(O_PROJ.replace("weight", kind)) for kind in ("weight", "bias"))
    dense = weight.double() @ result.mean[O_PROJ] + own
    staying = torch.zeros(32, dtype=torch.bool).view(2, 16)
    staying[torch.from_numpy(keep["layers.0.kv_group"])] = True
    pruned = weight.double()[:, staying.flatten()] @ result.mean[O_PROJ][staying.flatten()] + bias
    torch.testing.assert_close(pruned, dense, rtol=1e-5, atol=1e-6)


def test_magnitude_by_hand(tmp_path):
    stack = Stack.open(tiny_llama(tmp_path))
    weights = {name: w.abs() for name, w in load_file(tmp_path / "model.safetensors").items()}
    scores = magnitude(stack, random_ids(1, 2), Scoring())
    layer = "model.layers.1."
    q, k, v, o = (weights[f"{layer}self_attn.{name}_proj.weight"] for name in "qkvo")
    second_group = q[16:].sum() + k[8:].sum() + v[8:].sum() + o[:, 16:].sum()
    assert float(scores["layers.1.kv_group"][1]) == pytest.approx(float(second_group), rel=1e-5)
    gate, up, down = (weights[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    neuron = gate[5].sum() + up[5].sum() + down[:, 5].sum()
    assert float(scores["layers.1.mlp_neuron"][5]) == pytest.approx(float(neuron), rel=1e-5)


def test_random_is_its_seed(tmp_path):
    stack, ids = Stack.open(tiny_llama(tmp_path)), random_ids(1, 2)
    first, again, other = (random(stack, ids, Scoring(seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(values, again[name]) for name, values in first.items())
    assert not torch.equal(first["layers.0.mlp_neuron"], other["layers.0.mlp_neuron"])
    assert not torch.equal(first["layers.0.mlp_neuron"], first["layers.1.mlp_neuron"])


def test_llm_pruner_credits_a_group_with_its_own_heads(tmp_path):
    """Two groups of two heads: group 1 owns heads 2 and 3; the published code credits it with 1 and 3."""
    stack, ids = Stack.open(tiny_llama(tmp_path)), random_ids(3, 9)
    model = load_model(tmp_path)
    naive_loss(model(ids).logits, ids).backward()
    attention = model.model.layers[0].self_attn
    q, k, v, o = (
        (p.weight * p.weight.grad).abs().detach()
        for p in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    )
    heads = q.view(4, -1).sum(dim=1) + o.T.reshape(4, -1).sum(dim=1)
    shared = k.view(2, -1).sum(dim=1) + v.view(2, -1).sum(dim=1)
    ours, published = heads.view(2, 2).sum(dim=1) + shared, heads.view(2, 2).sum(dim=0) + shared
    scores = llm_pruner(stack, ids, Scoring())["layers.0.kv_group"]
    torch.testing.assert_close(scores, ours, rtol=1e-4, atol=0.0)
    assert not torch.allclose(scores, published, rtol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_scores_every_site(name, tmp_path):
    stack, ids, layers = Stack.open(tiny_llama(tmp_path)), random_ids(3, 9), []
    assert METHODS[name].name == name
    scores = METHODS[name].scorer(stack, ids, Scoring(on_layer=layers.append))
    sites = stack.architecture.sites()
    assert {n: (s.shape, s.dtype) for n, s in scores.items()} == {s.name: ((s.units,), torch.float32) for s in sites}
    assert all(torch.isfinite(values).all() for values in scores.values())
    assert name == "random" or set(layers) == {0, 1}


# -- the same share of every layer -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "expected"), [(32, (3, 1)), (30, (3, 1)), (80, (8, 3)), (12, (1, 0)), (3, (0, 0)), (1, (0, 0))]
)
def test_protected_layers_scale_with_depth(layers, expected):
    assert protected_layers((3, 1), layers) == expected


def scored_sites(path, **overrides):
    sites = Stack.open(tiny_llama(path, **overrides)).architecture.sites()
    generator = np.random.default_rng(0)
    return sites, {site.name: generator.random(site.units, dtype=np.float32) for site in sites}


def test_groups_are_rounded_down_and_neurons_meet_the_ratio(tmp_path):
    """A share of 0.4 of two groups is none, although one is nearer to 0.5 x 2; of 0.5 it is one."""
    sites, saliency = scored_sites(tmp_path)
    for ratio, groups in ((0.4, 2), (0.5, 1)):
        keep = allocate(sites, saliency, Allocation(ratio, "layers", round_to=1))
        assert [len(keep[f"layers.{layer}.kv_group"]) for layer in range(2)] == [groups, groups]
        neurons = [len(keep[f"layers.{layer}.mlp_neuron"]) for layer in range(2)]
        assert neurons[0] == neurons[1]
        achieved = achieved_ratio(sites, {name: len(kept) for name, kept in keep.items()})["total"]
        assert achieved == pytest.approx(ratio, abs=0.5 / 64)
        for name, kept in keep.items():
            assert set(kept) == set(np.argsort(saliency[name])[len(saliency[name]) - len(kept) :])


def test_protected_layers_lose_nothing_and_the_others_more(tmp_path):
    sites, saliency = scored_sites(tmp_path, num_hidden_layers=4)
    keep = allocate(sites, saliency, Allocation(0.2, "layers", round_to=1, protected_layers=(16, 8)))
    for site in sites:
        assert (len(keep[site.name]) == site.units) == (site.layer != 2)
    achieved = achieved_ratio(sites, {name: len(kept) for name, kept in keep.items()})["total"]
    assert achieved == pytest.approx(0.2, abs=0.005)


def test_protecting_too_much_is_refused(tmp_path):
    sites, saliency = scored_sites(tmp_path, num_hidden_layers=4)
    with pytest.raises(InputError, match=r"cannot be reached with 3 of 4 layers protected; ask for less than 0\.25"):
        allocate(sites, saliency, Allocation(0.3, "layers", protected_layers=(16, 8)))
    with pytest.raises(InputError, match="expected layers beside the 4 protected ones"):
        allocate(sites, saliency, Allocation(0.3, "layers", protected_layers=(16, 16)))


# -- ShortGPT ----------------------------------------------------------------------------------------------------------


def test_layers_to_remove_by_hand():
    influence = [0.9, 0.1, 0.3, 0.2]
    assert layers_to_remove(influence, [10, 10, 10, 10], 0.5) == ([1, 3], 0.5)
    assert layers_to_remove(influence, [10, 10, 10, 10], 0.36) == ([1], 0.25)
    assert layers_to_remove(influence, [10, 10, 10, 10], 0.99) == ([1, 2, 3], 0.75)
    assert layers_to_remove(influence, [10, 40, 10, 40], 0.3) == ([1], 0.4)
    assert layers_to_remove(influence, [1, 1, 1, 1], 0.0) == ([], 0.0)


def test_block_influence_equals_that_of_the_whole_model(tmp_path):
    stack, ids = Stack.open(save_family("llama", tmp_path)), random_ids(5, 12)
    model, streams = load_model(tmp_path), []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda m, x: streams.append(x[0]))
    model.model.norm.register_forward_pre_hook(lambda m, x: streams.append(x[0]))
    with torch.no_grad():
        model(ids)
    expected = [
        1 - float((before * after).sum(-1).div(before.norm(dim=-1) * after.norm(dim=-1)).mean())
        for before, after in itertools.pairwise(streams)
    ]
    assert block_influence(stack, ids) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", sorted(family_configs()))
@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_shortgpt_equals_the_dense_model_with_layers_skipped(name, ratio, tmp_path):
    dense, short = save_family(name, tmp_path / "dense"), tmp_path / "short"
    stack, ids = Stack.open(dense), random_ids(2, 12)
    achieved = write_shortgpt(dense, stack, ids, ratio, short)
    record = json.loads((short / RECORD_NAME).read_text())
    assert record["removed_layers"] and record["achieved_ratio"] == achieved
    model, pruned = load_model(dense), load_model(short)
    assert type(pruned) is type(model)
    for layer in record["removed_layers"]:  # left at their places: families tell a layer's kind by its number
        model.model.layers[layer].forward = lambda hidden, *args, **kwargs: hidden
    with torch.no_grad():
        torch.testing.assert_close(pruned(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    # the walk reads it too
    assert Stack.open(short).num_layers == stack.num_layers - len(record["removed_layers"])


def test_shortgpt_of_a_sharded_model(tmp_path):
    model = load_model(save_family("llama", tmp_path / "dense"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    ids, weights = random_ids(2, 12), []
    for source in ("dense", "sharded"):
        write_shortgpt(tmp_path / source, Stack.open(tmp_path / source), ids, 0.34, tmp_path / f"short-{source}")
        weights.append(load_model(tmp_path / f"short-{source}").state_dict())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_shortgpt_refuses_what_it_cannot_do(tmp_path):
    dense, ids = save_family("llama", tmp_path / "dense"), random_ids(2, 5)
    stack = Stack.open(dense)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="expected no such path, an empty directory or an earlier ShortGPT"):
        write_shortgpt(dense, stack, ids, 0.3, tmp_path / "taken")
    for target in (dense, tmp_path):
        with pytest.raises(InputError, match="apart from the dense model"):
            write_shortgpt(dense, stack, ids, 0.3, target)
    with pytest.raises(InputError, match="expected 0 <= ratio < 1, got 1"):
        write_shortgpt(dense, stack, ids, 1.0, tmp_path / "short")
    name = sorted(t5_configs())[0]
    t5 = save_family(name, tmp_path / "t5")
    with pytest.raises(InputError, match="expected a decoder-only model, got t5"):
        write_shortgpt(t5, Stack.open(t5), ids_for(name, 2, 5), 0.3, tmp_path / "short")
    assert not (tmp_path / "short").exists()
    for _ in range(2):  # its own checkpoint it replaces
        write_shortgpt(dense, stack, ids, 0.3, tmp_path / "short")


def test_shortgpt_refuses_a_pruned_model(tmp_path):
    from nirvana.plan import Plan
    from nirvana.surgery import prune
    from nirvana.weights import model_digest

    dense = save_family("llama", tmp_path / "dense")
    sites = Stack.open(dense).architecture.sites()
    keep = {site.name: np.arange(site.units - 8 * (site.module == "mlp" and site.layer == 0)) for site in sites}
    plan = Plan.build(
        sites,
        keep,
        model_digest=model_digest(dense),
        model_type="llama",
        calibration_digest="sha256:none",
        allocation=Allocation(0.1),
    )
    prune(dense, plan, tmp_path / "pruned")
    with pytest.raises(InputError, match="expected a model of a stock class, got nirvana_llama"):
        write_shortgpt(tmp_path / "pruned", Stack.open(tmp_path / "pruned"), random_ids(2, 5), 0.3, tmp_path / "short")
