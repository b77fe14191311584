"""What config.json says of a pruned model, for readers of every age: one spelling must not contradict the other."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import all_families, pruned_checkpoint, random_keep, save_family
from transformers import AutoConfig

from nirvana.export.export import export_checkpoint
from nirvana.walk import Stack

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1], "long_factor": [2.0, 3.0]}
ROPES = {
    "llama": LLAMA3,
    "mistral": {"rope_type": "default", "rope_theta": 1000000.0},
    "granite": {"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0},
    "qwen2": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500000.0},
    "qwen3": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 5e6, "original_max_position_embeddings": 64},
    "phi3": LONG | {"partial_rotary_factor": 0.5},
    "gemma3_text": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "qwen3_moe": {"rope_type": "default", "rope_theta": 5e6},
}


def change_config(path, **values):
    config = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps(config))


def config_of(path):
    return json.loads((path / "config.json").read_text())


def own_head(path):
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = torch.randn(512, 32, generator=torch.Generator().manual_seed(5))
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def equal_keep(model):
    """Keep sizes that every stock class accepts: all heads, and the first 16 neurons everywhere."""
    sites = Stack.open(model).architecture.sites()
    return {site.name: np.arange(site.units if site.module == "attention" else 16) for site in sites}


def unequal_keep(model):
    """Keep a number of neurons that differs by layer: no stock class can express it."""
    sites = Stack.open(model).architecture.sites()
    keep = random_keep(sites)
    mlp = [site.name for site in sites if site.module == "mlp" and site.layer == 0]
    return keep | {name: keep[name][:-3] for name in mlp}


@pytest.mark.parametrize("name", sorted(ROPES))
@pytest.mark.parametrize("kind", ["stock", "pruned", "padded"])
def test_both_spellings_of_rope_agree_and_read_back_equal(name, kind, tmp_path):
    model = save_family(name, tmp_path / "dense")
    change_config(model, rope_parameters=ROPES[name])
    keep = equal_keep(model) if kind == "stock" else unequal_keep(model)
    written = tmp_path / "pruned"
    pruned_checkpoint(model, keep, written)
    if kind == "padded":
        written = export_checkpoint(tmp_path / "pruned", "padded", model, tmp_path / "padded", ids=ids_file(tmp_path))
        written = written.directory
    config = config_of(written)
    assert ("auto_map" in config) == (kind == "pruned")
    full = ROPES[name].get("full_attention", ROPES[name])
    assert config["rope_theta"] == full["rope_theta"]
    if full["rope_type"] == "default":
        assert config["rope_scaling"] is None
    else:
        spelled = {"type" if key == "rope_type" and name == "phi3" else key: value for key, value in full.items()}
        assert config["rope_scaling"].items() <= spelled.items()
        assert {"factor", "short_factor"} & set(config["rope_scaling"])
    if name == "gemma3_text":
        assert config["rope_local_base_freq"] == 10000.0
    dense, read = AutoConfig.from_pretrained(model), AutoConfig.from_pretrained(written)
    assert read.rope_parameters.items() >= dense.rope_parameters.items()
    # a reader that knows the earlier keys only, played by transformers without the later one
    config.pop("rope_parameters")
    earlier = type(read).from_dict(config).rope_parameters
    assert without_type(earlier) == without_type(dense.rope_parameters)


def without_type(rope):
    return {key: value for key, value in rope.items() if key != "type"}


def ids_file(tmp_path):
    (tmp_path / "ids.json").write_text(json.dumps(list(range(3, 40))))
    return tmp_path / "ids.json"


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "granite"])
@pytest.mark.parametrize("kind", ["stock", "pruned", "padded", "hf"])
def test_a_head_of_its_own_is_not_called_tied(name, kind, tmp_path):
    model = save_family(name, tmp_path / "dense")
    own_head(model)
    change_config(model, tie_word_embeddings=True)
    keep = equal_keep(model) if kind == "stock" else unequal_keep(model)
    pruned_checkpoint(model, keep, tmp_path / "pruned")
    assert config_of(tmp_path / "pruned")["tie_word_embeddings"] is False
    if kind in ("padded", "hf"):
        export_checkpoint(tmp_path / "pruned", kind, model, tmp_path / kind, ids=ids_file(tmp_path))
        assert config_of(tmp_path / kind)["tie_word_embeddings"] is False


def test_a_stored_copy_of_the_embedding_stays_tied(tmp_path):
    model = save_family("llama", tmp_path / "dense")
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    pruned_checkpoint(model, unequal_keep(model), tmp_path / "pruned")
    assert config_of(tmp_path / "pruned")["tie_word_embeddings"] is True


def test_the_number_of_experts_is_written_under_both_names(tmp_path):
    model = save_family("qwen3_moe", tmp_path / "dense")
    pruned_checkpoint(model, equal_keep(model), tmp_path / "pruned")
    config = config_of(tmp_path / "pruned")
    assert (config["model_type"], config["num_experts"], config["num_local_experts"]) == ("qwen3_moe", 4, 4)


@pytest.mark.parametrize(
    ("types", "period"),
    [
        (["sliding_attention", "sliding_attention", "full_attention"], 3),
        (["sliding_attention", "full_attention", "sliding_attention"], 2),
        (["full_attention", "full_attention", "sliding_attention"], None),
        (["sliding_attention"] * 3, 4),
    ],
)
def test_the_period_of_layer_types_is_written_where_there_is_one(types, period, tmp_path):
    model = save_family("gemma3_text", tmp_path / "dense")
    change_config(model, layer_types=types)
    pruned_checkpoint(model, equal_keep(model), tmp_path / "pruned")
    assert config_of(tmp_path / "pruned").get("sliding_window_pattern") == period


@pytest.mark.parametrize("name", all_families())
def test_a_configuration_reads_back_as_the_dense_ones_but_for_its_sizes(name, tmp_path):
    model = save_family(name, tmp_path / "dense")
    pruned_checkpoint(model, unequal_keep(model), tmp_path / "pruned")
    dense, pruned = (AutoConfig.from_pretrained(path).to_dict() for path in (model, tmp_path / "pruned"))
    differing = {key for key in dense.keys() | pruned.keys() if dense.get(key) != pruned.get(key)}
    sizes = {"per_layer_config", "allow_global_per_layer_attribute_access", "pruned_layers", "head_dim"}
    repeated = {"_sliding_window_pattern", "sliding_window_pattern", "partial_rotary_factor"}
    assert differing <= sizes | repeated | {"model_type", "architectures", "auto_map", "_name_or_path"}
