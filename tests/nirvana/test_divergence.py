"""KL of a plan against the KL of the built model, computed from full log-probabilities."""

import pytest
import torch
from tiny import masked_dense, random_ids, random_keep, save_family
from transformers import AutoModelForCausalLM

from nirvana.divergence import kl_divergence
from nirvana.errors import InputError
from nirvana.walk import Stack, final_hidden_states


def naive_kl(dense, pruned, ids):
    with torch.no_grad():
        p, q = (model(ids).logits.double().log_softmax(dim=-1) for model in (dense, pruned))
    return (p.exp() * (p - q)).sum(dim=-1).mean().item()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral-sliding"])
def test_equals_kl_of_the_built_model(name, tmp_path):
    stack = Stack.open(save_family(name, tmp_path))
    keep, ids = random_keep(stack.architecture.sites()), random_ids(3, 15)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    expected = naive_kl(dense, masked_dense(tmp_path, keep), ids)
    value = kl_divergence(stack, keep, ids, final_hidden_states(stack, ids))
    assert expected > 0.1
    assert value == pytest.approx(expected, abs=1e-5)


def test_nothing_pruned_costs_nothing(tmp_path):
    stack = Stack.open(save_family("llama", tmp_path))
    ids = random_ids(2, 9)
    keep = random_keep(stack.architecture.sites(), share=1.0)
    assert kl_divergence(stack, keep, ids, final_hidden_states(stack, ids)) == pytest.approx(0, abs=1e-7)


def test_microbatches_change_nothing(tmp_path, monkeypatch):
    stack = Stack.open(save_family("mistral-sliding", tmp_path))
    keep, ids = random_keep(stack.architecture.sites()), random_ids(5, 11)
    whole = kl_divergence(stack, keep, ids, final_hidden_states(stack, ids))
    monkeypatch.setattr("nirvana.walk.FORWARD_TOKENS", 25)
    assert kl_divergence(stack, keep, ids, final_hidden_states(stack, ids)) == pytest.approx(whole, rel=1e-5)


def test_hidden_states_of_other_sequences_are_refused(tmp_path):
    stack = Stack.open(save_family("llama", tmp_path))
    keep, ids = random_keep(stack.architecture.sites()), random_ids(3, 7)
    with pytest.raises(InputError, match="compute them on the same sequences"):
        kl_divergence(stack, keep, ids, final_hidden_states(stack, ids[:2]))
