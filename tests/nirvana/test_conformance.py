"""The comparison of the walk with transformers' class: it passes what is right, and names what is not."""

import json
import math

import pytest
import transformers
from safetensors.torch import load_file, save_file
from tiny import all_families, pruned_checkpoint, random_keep, save_family, tiny_tokenizer

from nirvana import conformance
from nirvana.allocation import Allocation
from nirvana.architectures import registry
from nirvana.architectures.llama import Llama
from nirvana.conformance import check_walk, check_walk_once, check_written
from nirvana.errors import InputError
from nirvana.plan import Plan
from nirvana.slicing import Slicer
from nirvana.surgery import prune
from nirvana.walk import Stack
from nirvana.weights import model_digest


@pytest.fixture
def streamed(monkeypatch):
    """Take every model for a large one."""
    monkeypatch.setattr(conformance, "WHOLE_BYTES", 0)


def plan_for(model, seed=0, share=0.6):
    sites = Stack.open(model).architecture.sites()
    return Plan.build(
        sites,
        random_keep(sites, seed, share),
        model_digest=model_digest(model),
        model_type="any",
        calibration_digest="sha256:none",
        allocation=Allocation(0.4),
    )


@pytest.mark.parametrize("name", all_families())
def test_a_large_model_is_compared_a_layer_at_a_time(name, streamed, tmp_path):
    model = save_family(name, tmp_path / "dense")
    found = check_walk(model)
    assert not found.whole
    assert found.largest_difference <= 1e-6
    pruned_checkpoint(model, random_keep(Stack.open(model).architecture.sites()), tmp_path / "pruned")
    assert check_walk(tmp_path / "pruned").largest_difference <= 1e-6


@pytest.mark.parametrize(
    ("name", "layers"),
    [("llama", (0, 1)), ("qwen2-sliding", (0, 1, 2)), ("gemma3_text", (0, 1, 2)), ("qwen3_moe", (0, 1, 2))],
)
def test_every_kind_of_layer_is_shown(name, layers, streamed, tmp_path):
    assert check_walk(save_family(name, tmp_path)).layers == layers


def test_layers_that_show_nothing_new_are_left_out_on_both_sides(streamed, tmp_path):
    model = save_family("qwen2", tmp_path, num_hidden_layers=9, max_window_layers=6)
    config = json.loads((model / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 6, "layer_types": None}
    (model / "config.json").write_text(json.dumps(config))
    assert check_walk(model).layers == (0, 1, 6, 7)


def test_texts_leave_small_windows_and_contexts_behind(tmp_path):
    found = check_walk(save_family("mistral-sliding", tmp_path))
    short, longer, again = found.tokens
    assert short < longer > again
    assert longer > 512  # max_position_embeddings


class Forgetful(Llama):
    """Granite described as Llama: without the factor on embeddings."""

    model_type = "granite"


@pytest.mark.parametrize("whole", [True, False])
def test_a_switch_that_no_description_follows_is_named(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(conformance, "WHOLE_BYTES", 1 << 26 if whole else 0)
    monkeypatch.setitem(registry.FAMILIES, "granite", Forgetful)
    factor = "_".join(["embedding", "multiplier"])  # the description of this file must not know it
    with pytest.raises(InputError, match=rf"first in what leaves layer 0; keys .* granite does not: .*{factor}=6\.0"):
        check_walk(save_family("granite", tmp_path))


def test_a_wrong_head_is_told_from_a_wrong_layer(tmp_path, monkeypatch):
    model = save_family("llama", tmp_path)
    monkeypatch.setattr(Llama, "output_scale", 2.0)
    with pytest.raises(InputError, match="first in the logits"):
        check_walk(model)


def test_nan_does_not_pass(tmp_path):
    model = save_family("llama", tmp_path)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"a difference of nan .* first in what leaves layer 1"):
        check_walk(model)


def test_real_tokens_are_used_where_there_is_a_tokenizer(tmp_path, monkeypatch):
    model = save_family("llama", tmp_path)
    fixed = conformance._tokens(model, 512)
    tiny_tokenizer().save_pretrained(model)
    read = conformance._tokens(model, 512)
    assert read != fixed
    assert max(read) < 512
    assert conformance._tokens(model, 100) != read  # ids that this model has no embedding for


def test_what_was_found_is_kept_until_something_changes(tmp_path, monkeypatch):
    model, cache, calls = save_family("llama", tmp_path / "model"), tmp_path / "cache", []
    monkeypatch.setattr(conformance, "check_walk", lambda directory: calls.append(directory) or check_walk(directory))
    first = check_walk_once(model, cache)
    assert check_walk_once(model, cache) == first
    assert len(calls) == 1
    config = json.loads((model / "config.json").read_text()) | {"rms_norm_eps": 0.25}
    (model / "config.json").write_text(json.dumps(config))
    check_walk_once(model, cache)
    assert len(calls) == 2
    monkeypatch.setattr(transformers, "__version__", "99")
    check_walk_once(model, cache)
    assert len(calls) == 3
    for file in cache.iterdir():
        file.write_text('{"layers": 3')  # damaged: compared again
    check_walk_once(model, cache)
    assert len(calls) == 4


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path):
    model = save_family("llama", tmp_path / "model")
    (tmp_path / "file").write_text("")
    check_walk_once(model, tmp_path / "file" / "cache")


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3_moe", "t5-relu-tied"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_damaged_checkpoint_is_not_taken_for_its_plan(name, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(conformance, "WHOLE_BYTES", 1 << 26 if whole else 0)
    model = save_family(name, tmp_path / "dense")
    plan, target = plan_for(model), tmp_path / "pruned"
    prune(model, plan, target, verified=True)
    dense = Stack.open(model)
    assert check_written(target, dense, plan).largest_difference <= 1e-5
    weights = load_file(target / "model.safetensors")
    outputs = ("layers.1.self_attn.o_proj.weight", "decoder.block.1.layer.0.SelfAttention.o.weight")
    weights[next(key for key in weights if key.endswith(outputs))] *= 1.5
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="masked by the plan does, got a difference of"):
        check_written(target, dense, plan)


def test_nothing_is_left_of_a_checkpoint_that_says_something_else(tmp_path, monkeypatch):
    model = save_family("llama", tmp_path / "dense")
    monkeypatch.setattr(Slicer, "apply", lambda self, name, tensor, apply=Slicer.apply: 1.1 * apply(self, name, tensor))
    with pytest.raises(InputError, match=f"^{tmp_path / 'pruned'}: expected NirvanaLlamaForCausalLM|LlamaForCausalLM"):
        prune(model, plan_for(model), tmp_path / "pruned", verified=True)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_model_that_blows_up_what_is_rounded_is_no_false_alarm(tmp_path):
    """Random weights and gains far from 1: sums of another length differ by more than 1e-4, yet nothing is wrong."""
    settings = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6}
    layers = {"intermediate_size": 17, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    model = save_family("gemma3_text", tmp_path / "dense", **settings, **layers, hidden_activation="gelu")
    weights = load_file(model / "model.safetensors")
    for name, weight in weights.items():
        if weight.ndim == 1:
            weight[0] *= 30
        elif "embed" not in name:
            weight *= 6
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    dense = Stack.open(model)
    found = []
    for seed in range(3):
        plan = plan_for(model, seed, 0.3)
        prune(model, plan, tmp_path / f"{seed}", verified=True)
        found.append(check_written(tmp_path / f"{seed}", dense, plan).largest_difference)
    assert max(found) > conformance.TOLERANCE  # else this test shows nothing
