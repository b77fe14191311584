"""Loading for inference: float32, from the directory alone, with one line where it fails."""

import pytest
import torch
from tiny import save_family

from nirvana.errors import InputError
from nirvana.loading import load_model


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
