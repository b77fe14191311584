"""Tensors written to their places in any order give the file that writing them in order gives."""

import itertools

import torch
from safetensors.torch import load_file

from nirvana.checkpoint.safetensors_stream import Shards, stream_safetensors
from nirvana.files import read_json, sha256_file

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.arange(4, dtype=torch.bfloat16),
    "c": torch.tensor([7.0]),
}
DESCRIBED = {"a": ("F32", (2, 3)), "b": ("BF16", (4,)), "c": ("F32", (1,))}


def test_any_order_gives_the_same_bytes_and_their_digest(tmp_path):
    digest = stream_safetensors(tmp_path / "whole", DESCRIBED, TENSORS.__getitem__)
    assert digest == sha256_file(tmp_path / "whole")
    loaded = load_file(tmp_path / "whole")
    assert loaded.keys() == TENSORS.keys() and all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)
    for count in range(4):
        for first in itertools.permutations(TENSORS, count):
            shards = Shards(tmp_path, DESCRIBED, dict.fromkeys(TENSORS, "model.safetensors"))
            for name in first:
                shards.put(name, TENSORS[name])
            assert shards.complete(TENSORS.__getitem__) == {"model.safetensors": digest}
            assert sha256_file(tmp_path / "model.safetensors") == digest


def test_several_files_have_an_index(tmp_path):
    shards = Shards(tmp_path, DESCRIBED, {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"})
    shards.put("c", TENSORS["c"])
    digests = shards.complete(TENSORS.__getitem__)
    assert digests == {name: sha256_file(tmp_path / name) for name in ("1.safetensors", "2.safetensors")}
    index = read_json(tmp_path / "model.safetensors.index.json")
    assert index["metadata"] == {"total_size": 36} and index["weight_map"]["c"] == "1.safetensors"
