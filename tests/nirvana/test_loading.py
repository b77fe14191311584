"""Loading for inference: float32, from the directory alone, with one line where it fails."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_family, save_t5, t5_configs
from transformers import T5ForConditionalGeneration

from nirvana.errors import InputError
from nirvana.loading import load_config, load_model


def test_loads_in_float32(tmp_path):
    model = load_model(save_family("qwen3", tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training


def test_missing_directory_never_becomes_a_hub_name():
    with pytest.raises(InputError, match="found none"):
        load_model("no/where")


def test_truncated_weights_are_one_line(tmp_path):
    file = save_family("llama", tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(InputError, match="expected a whole checkpoint") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", t5_configs())
def test_an_encoder_decoder_loads_as_one(tmp_path, name):
    model = load_model(save_t5(name, tmp_path))
    assert isinstance(model, T5ForConditionalGeneration)
    assert model.config.is_encoder_decoder
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    # a head of its own stays one
    assert (model.lm_head.weight is model.shared.weight) == (name == "t5-relu-tied")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"model_type": "nobody"}', "{}", '{"model_type": "llama", "hidden_size": "x"}']
)
def test_an_odd_configuration_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json: expected") as caught:
        load_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_that_are_missing_are_never_random_numbers(tmp_path):
    save_family("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"found no model\.layers\.1\.mlp\.up_proj\.weight \(1 missing\)"):
        load_model(tmp_path)


def test_a_folder_without_a_model_type_is_not_guessed_from_its_name(tmp_path):
    """transformers would take the first family whose name is part of the path."""
    save_family("qwen2", tmp_path / "my-llama")
    config = json.loads((tmp_path / "my-llama" / "config.json").read_text())
    del config["model_type"]
    (tmp_path / "my-llama" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="got model_type None"):
        load_model(tmp_path / "my-llama")
