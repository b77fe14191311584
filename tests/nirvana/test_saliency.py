"""Saliency against a hand-computed case and against naive code that holds every gradient and all logits."""

import re

import pytest
import torch
from naive import naive_saliency
from safetensors.torch import load_file, save_file
from tiny import all_families, ids_for, random_ids, save_family
from transformers import AutoModelForCausalLM

from nirvana.allocation import Allocation, allocate
from nirvana.architectures.site import Site, Slot
from nirvana.errors import InputError
from nirvana.saliency import channel_key, channel_saliency, unit_saliency
from nirvana.walk import Stack


@pytest.mark.parametrize("memory", ["lean", "fast"])
@pytest.mark.parametrize("name", all_families())
def test_equals_naive_full_gradient(name, memory, tmp_path):
    save_family(name, tmp_path)
    stack, ids = Stack.open(tmp_path), ids_for(name, 5, 12)
    objective, saliency = naive_saliency(tmp_path, ids)
    result = channel_saliency(stack, ids, microbatch=2, memory=memory)
    assert result.objective == pytest.approx(objective, rel=1e-5)
    expected = {
        channel_key(slot): saliency[slot.parameter].sum(dim=1 - slot.dim)
        for site in stack.architecture.sites()
        for slot in site.weight_slots
    }
    assert result.sums.keys() == expected.keys()
    # T5 does not scale its attention scores: naive float32 itself is 4e-3 from naive float64 on these models
    rtol = 1e-3 if name.startswith("t5") else 1e-4
    for key, vector in expected.items():
        torch.testing.assert_close(result.sums[key], vector, rtol=rtol, atol=1e-7 * float(vector.max()))


@pytest.mark.parametrize("name", all_families())
def test_execution_and_memory_change_no_bit(name, tmp_path):
    save_family(name, tmp_path)
    ids = ids_for(name, 5, 12)
    resident, streamed = Stack.open(tmp_path), Stack.open(tmp_path, execution="streamed")
    expected = channel_saliency(resident, ids, 2)
    for result in (channel_saliency(streamed, ids, 2), channel_saliency(resident, ids, 2, memory="fast")):
        assert result.objective == expected.objective
        assert result.sums.keys() == expected.sums.keys()
        assert all(torch.equal(result.sums[key], vector) for key, vector in expected.sums.items())


def test_fast_needs_resident_weights(tmp_path):
    stack = Stack.open(save_family("llama", tmp_path), execution="streamed")
    with pytest.raises(InputError, match=r"memory fast .* expected execution resident, got streamed"):
        channel_saliency(stack, random_ids(2, 5), memory="fast")


@pytest.mark.parametrize("microbatch", [1, 3, 4])
def test_microbatch_changes_nothing(microbatch, tmp_path):
    stack, ids = Stack.open(save_family("llama", tmp_path)), random_ids(6, 9)
    whole, parts = (channel_saliency(stack, ids, size) for size in (6, microbatch))
    assert parts.objective == pytest.approx(whole.objective, rel=1e-6)
    for key, vector in whole.sums.items():
        torch.testing.assert_close(parts.sums[key], vector, rtol=1e-4, atol=1e-7 * float(vector.max()))


def test_absolute_value_follows_the_sum_over_the_set(tmp_path):
    """The trap: |·| per sequence gives other values than |·| of the summed gradient."""
    stack, ids = Stack.open(save_family("llama", tmp_path)), random_ids(4, 9)
    together = channel_saliency(stack, ids, 1).sums
    one_by_one = [channel_saliency(stack, ids[i : i + 1], 1).sums for i in range(4)]
    key = "model.layers.0.mlp.up_proj.weight:0"
    added = sum(sums[key] for sums in one_by_one) / 4
    assert (added > together[key] * 1.01).any()


def test_unit_saliency_by_hand():
    site = Site(
        "layers.0.kv_group",
        "attention",
        0,
        2,
        (Slot("q", 0, 2, 5), Slot("k", 0, 1, 5), Slot("k.bias", 0, 1, 1, is_bias=True)),
    )
    sums = {"q:0": torch.tensor([1.0, 2.0, 3.0, 4.0]), "k:0": torch.tensor([10.0, 20.0])}
    assert unit_saliency([site], sums)["layers.0.kv_group"].tolist() == [13.0, 27.0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.1.mlp.up_proj.weight", float("inf")),
        ("model.layers.0.self_attn.k_proj.weight", float("nan")),
        ("model.embed_tokens.weight", float("nan")),
        ("model.norm.weight", float("-inf")),
    ],
)
def test_not_finite_weight_is_named(name, value, tmp_path):
    save_family("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights[name].view(-1)[3] = value
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    ids = torch.arange(512).view(4, 128)  # every token: a broken embedding row is used
    with pytest.raises(InputError, match=rf"^{re.escape(name)}: expected finite weights"):
        channel_saliency(Stack.open(tmp_path), ids)


def test_overflow_with_finite_weights_names_a_gradient(tmp_path):
    save_family("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"].fill_(3e38)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"^model\.layers\.2\..*: expected a finite gradient"):
        channel_saliency(Stack.open(tmp_path), random_ids(2, 5))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3-biases", "mistral-sliding"])
def test_kept_sets_differ_from_naive_only_at_the_cut(name, tmp_path):
    save_family(name, tmp_path)
    stack, ids = Stack.open(tmp_path), random_ids(5, 12)
    sites = stack.architecture.sites()
    _, full = naive_saliency(tmp_path, ids)
    slots = [slot for site in sites for slot in site.weight_slots]
    naive = unit_saliency(sites, {channel_key(s): full[s.parameter].sum(dim=1 - s.dim) for s in slots})
    ours = unit_saliency(sites, channel_saliency(stack, ids).sums)
    asked = Allocation(0.4, gamma=3.36, round_to=1)
    kept = [allocate(sites, {k: v.numpy() for k, v in s.items()}, asked) for s in (naive, ours)]
    for module in ("attention", "mlp"):
        of_module = [site.name for site in sites if site.module == module]
        gone = [naive[n][~torch.isin(torch.arange(len(naive[n])), torch.from_numpy(kept[0][n]))] for n in of_module]
        cut = max((float(values.max()) for values in gone if len(values)), default=0.0)
        for site in of_module:
            for unit in set(kept[0][site].tolist()) ^ set(kept[1][site].tolist()):
                assert float(naive[site][unit]) == pytest.approx(cut, rel=1e-4)


def test_token_out_of_range_is_refused(tmp_path):
    stack = Stack.open(save_family("llama", tmp_path))
    with pytest.raises(InputError, match="below the model's vocabulary size 512, got 0 to 512"):
        channel_saliency(stack, torch.tensor([[0, 512]]))


def test_bf16_weights_compute_in_float32(tmp_path):
    save_family("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    ids = random_ids(2, 8)
    model.float().save_pretrained(tmp_path / "fp32")
    stored, upcast = (channel_saliency(Stack.open(tmp_path / d), ids).sums for d in ("bf16", "fp32"))
    for key, vector in upcast.items():
        assert torch.equal(stored[key], vector)
