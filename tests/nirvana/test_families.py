"""The property that every family must have: pruned == dense with those units set to zero."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from tiny import (
    all_families,
    family_configs,
    ids_for,
    logits_of,
    masked_dense,
    model_type_of,
    pruned_checkpoint,
    random_ids,
    random_keep,
    save_family,
    save_t5,
    walk_logits,
)
from transformers import CONFIG_MAPPING, GPT2Config

from nirvana.architectures.registry import FAMILIES, REFUSED, architecture_for, read_config
from nirvana.errors import InputError
from nirvana.loading import load_model
from nirvana.walk import Stack

NAMES = all_families()


def test_every_family_is_tried():
    assert {model_type_of(name) for name in NAMES} == set(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_pruned_equals_masked_dense(name, tmp_path):
    model = save_family(name, tmp_path / "dense")
    stack = Stack.open(model)
    keep = random_keep(stack.architecture.sites())
    ids = ids_for(name, 2, 11)
    with torch.no_grad():
        expected = logits_of(masked_dense(model, keep), ids)
        pruned = pruned_checkpoint(model, keep, tmp_path / "pruned")
        torch.testing.assert_close(logits_of(pruned, ids), expected, rtol=1e-5, atol=1e-5)
        # the walk that scores plans sees the same model
        torch.testing.assert_close(walk_logits(stack, keep, ids), expected, rtol=1e-5, atol=1e-5)
    assert pruned.num_parameters() < sum(p.numel() for p in masked_dense(model, keep).parameters())


@pytest.mark.parametrize("name", NAMES)
def test_dense_walk_equals_model(name, tmp_path):
    model = save_family(name, tmp_path)
    stack, ids = Stack.open(model), ids_for(name, 2, 13)
    keep = {site.name: np.arange(site.units) for site in stack.architecture.sites()}
    with torch.no_grad():
        expected = logits_of(load_model(model), ids)
    torch.testing.assert_close(walk_logits(stack, keep, ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_pruned_model_generates_alike_in_every_mode(name, tmp_path):
    # transformers 5.23 sizes the cache of generate by the encoder: stacks of one depth
    save = partial(save_t5, num_decoder_layers=2) if name.startswith("t5") else save_family
    model = save(name, tmp_path / "dense")
    keep = random_keep(Stack.open(model).architecture.sites(), seed=3)
    ids = random_ids(2, 5)
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if name.startswith("t5"):
        settings["decoder_start_token_id"] = 0
    expected = masked_dense(model, keep).generate(ids, **settings)
    pruned = pruned_checkpoint(model, keep, tmp_path / "pruned")
    assert torch.equal(pruned.generate(ids, **settings), expected)
    assert torch.equal(pruned.generate(ids, use_cache=False, **settings), expected)
    assert torch.equal(pruned.generate(ids, cache_implementation="static", **settings), expected)
    pruned.set_attn_implementation("eager")
    attention = [m for m in pruned.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "config")]
    assert attention and all(m.config._attn_implementation == "eager" for m in attention)
    assert torch.equal(pruned.generate(ids, **settings), expected)


def test_a_window_that_the_family_ignores_is_ignored_by_the_walk(tmp_path):
    """Llama's own code never reads `sliding_window`; a configuration may have the key all the same."""
    config = json.loads((save_family("llama", tmp_path) / "config.json").read_text())
    stray = {"sliding_window": 4, "layer_types": ["sliding_attention"] * 3}
    (tmp_path / "config.json").write_text(json.dumps(config | stray))
    stack, ids = Stack.open(tmp_path), random_ids(2, 13)
    keep = {site.name: np.arange(site.units) for site in stack.architecture.sites()}
    with torch.no_grad():
        expected = load_model(tmp_path)(ids, use_cache=False).logits
    torch.testing.assert_close(walk_logits(stack, keep, ids), expected, rtol=1e-5, atol=1e-5)


def test_kv_group_owns_what_the_drawing_shows():
    """Hand-counted: 4 query heads in 2 groups of head_dim 8, hidden 32."""
    attention, mlp = architecture_for(family_configs()["llama"]).sites()[:2]
    assert (attention.units, mlp.units) == (2, 48)
    # a group's rows: 2·8 query, 8 key, 8 value; 2·8 output columns; each 32 wide
    assert attention.weights_per_unit == (16 + 8 + 8 + 16) * 32
    assert mlp.weights_per_unit == 3 * 32
    assert [(s.parameter.rsplit(".", 2)[1], s.dim, s.block) for s in attention.slots] == [
        ("q_proj", 0, 16),
        ("k_proj", 0, 8),
        ("v_proj", 0, 8),
        ("o_proj", 1, 16),
    ]


def test_explicit_head_dim_is_not_hidden_over_heads():
    attention = architecture_for(family_configs()["qwen3"]).sites()[0]
    assert attention.slots[1].block == 16


def test_biases_are_cut_but_do_not_count():
    attention = architecture_for(family_configs()["qwen2"]).sites()[0]
    assert {slot.parameter.rsplit(".", 1)[1] for slot in attention.slots} == {"weight", "bias"}
    assert all(slot.parameter.endswith("weight") for slot in attention.weight_slots)


def test_unsupported_architecture_names_the_supported(tmp_path):
    GPT2Config(n_layer=1, n_embd=8, n_head=2).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"unsupported architecture 'gpt2'.*llama, mistral, .*qwen2, qwen3"):
        architecture_for(read_config(tmp_path))


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_a_family_whose_units_are_not_independent_is_refused_for_that(model_type):
    with pytest.raises(
        InputError, match=rf"'{model_type}': its query and key norms run over all heads .* expected one of"
    ):
        architecture_for(CONFIG_MAPPING[model_type]())


def test_pruned_model_can_be_pruned_again(tmp_path):
    model = save_family("llama", tmp_path / "dense")
    first = random_keep(Stack.open(model).architecture.sites(), share=0.8)
    pruned_checkpoint(model, first, tmp_path / "once")
    second = random_keep(Stack.open(tmp_path / "once").architecture.sites(), seed=1, share=0.7)
    with torch.no_grad():
        twice = pruned_checkpoint(tmp_path / "once", second, tmp_path / "twice")(random_ids(1, 7)).logits
        both = {name: first[name][second[name]] for name in first}
        expected = masked_dense(model, both)(random_ids(1, 7)).logits
    torch.testing.assert_close(twice, expected, rtol=1e-5, atol=1e-5)
