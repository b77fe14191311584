"""What a model directory must hold before anything is computed from it; the walk itself is in test_families."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_ids, save_family
from transformers import AutoModelForCausalLM

import nirvana
from nirvana.errors import InputError
from nirvana.saliency import channel_saliency
from nirvana.walk import Stack, final_hidden_states


def change_config(path, **values):
    config = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps(config))


def change_weights(path, change):
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "values",
    [
        {"num_key_value_heads": 0},
        {"num_attention_heads": 0},
        {"num_attention_heads": "x"},
        {"rope_parameters": "x"},
        {"rope_parameters": {"rope_type": "bogus"}},
        {"dtype": "foo"},
        {"per_layer_config": "x"},
        {"hidden_act": "nope"},
        {"pad_token_id": 9999},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 2},
        {"hidden_size": 64},
        {"vocab_size": 1000},
        {"intermediate_size": 10**12},
        {"quantization_config": {"quant_method": "fp8"}},
    ],
    ids=str,
)
def test_odd_configuration_is_one_line(values, tmp_path):
    save_family("llama", tmp_path)
    change_config(tmp_path, **values)
    with pytest.raises(InputError, match="expected") as caught:
        channel_saliency(Stack.open(tmp_path), random_ids(1, 4))
    assert "\n" not in str(caught.value)


def test_missing_norm_is_named(tmp_path):
    save_family("llama", tmp_path)
    name = "model.layers.1.input_layernorm.weight"
    change_weights(tmp_path, lambda weights: weights.pop(name))
    with pytest.raises(InputError, match=name):
        Stack.open(tmp_path)


def test_scales_of_a_quantised_model_are_not_ignored(tmp_path):
    save_family("llama", tmp_path)
    extra = {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(48, 1)}
    change_weights(tmp_path, lambda weights: weights.update(extra))
    with pytest.raises(InputError, match=r"up_proj\.weight_scale: expected the parameters of a llama model"):
        Stack.open(tmp_path)


def test_a_head_of_its_own_counts_even_if_the_configuration_ties(tmp_path):
    save_family("llama", tmp_path)
    head = torch.randn(512, 32, generator=torch.Generator().manual_seed(5))
    change_weights(tmp_path, lambda weights: weights.update({"lm_head.weight": head}))
    stack, ids = Stack.open(tmp_path), random_ids(2, 7)
    logits = final_hidden_states(stack, ids) @ stack.head_weight().T
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_empty_sequences_are_refused(tmp_path):
    stack = Stack.open(save_family("llama", tmp_path))
    for ids in (torch.zeros(0, 5, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64)):
        with pytest.raises(InputError, match="expected sequences of token ids"):
            channel_saliency(stack, ids)
    with pytest.raises(InputError, match="microbatch: expected at least 1"):
        channel_saliency(stack, random_ids(1, 4), microbatch=0)


def test_the_old_name_of_the_walk_warns_and_computes_the_same(tmp_path):
    stack, ids, layers = Stack.open(save_family("llama", tmp_path)), random_ids(2, 5), []
    with pytest.warns(DeprecationWarning, match="final_hidden_states"):
        old = nirvana.dense_hidden_states(stack, ids, layers.append)
    assert torch.equal(old, nirvana.final_hidden_states(stack, ids)) and layers == [0, 1, 2]
