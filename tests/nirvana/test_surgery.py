"""Surgery: right bytes, whole or nothing."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import random_keep, save_family, tiny_tokenizer
from transformers import AutoModelForCausalLM

from nirvana.errors import InputError
from nirvana.plan import Plan
from nirvana.surgery import prune
from nirvana.walk import Stack
from nirvana.weights import model_digest


def plan_for(model, seed=0, share=0.6):
    sites = Stack.open(model).architecture.sites()
    keep = random_keep(sites, seed, share) | {"layers.2.mlp_neuron": np.arange(3, 20)}
    return Plan.build(
        sites,
        keep,
        model_digest=model_digest(model),
        model_type="llama",
        calibration_digest="sha256:none",
        parameters={"pruning_ratio": 0.4},
    )


def test_slices_by_hand(tmp_path):
    model = save_family("qwen2", tmp_path / "dense")
    plan = plan_for(model)
    prune(model, plan, tmp_path / "pruned")
    dense, pruned = load_file(model / "model.safetensors"), load_file(tmp_path / "pruned/model.safetensors")
    assert dense.keys() == pruned.keys()
    for layer in range(3):
        group = int(plan.keep[f"layers.{layer}.kv_group"][0])  # one of two groups of head_dim 8 stays
        neurons = torch.from_numpy(plan.keep[f"layers.{layer}.mlp_neuron"])
        base = f"model.layers.{layer}."
        rows = slice(group * 16, group * 16 + 16)
        assert torch.equal(pruned[base + "self_attn.q_proj.weight"], dense[base + "self_attn.q_proj.weight"][rows])
        assert torch.equal(pruned[base + "self_attn.q_proj.bias"], dense[base + "self_attn.q_proj.bias"][rows])
        assert torch.equal(pruned[base + "self_attn.o_proj.weight"], dense[base + "self_attn.o_proj.weight"][:, rows])
        assert torch.equal(pruned[base + "mlp.down_proj.weight"], dense[base + "mlp.down_proj.weight"][:, neurons])
        assert torch.equal(pruned[base + "input_layernorm.weight"], dense[base + "input_layernorm.weight"])
    assert torch.equal(pruned["model.embed_tokens.weight"], dense["model.embed_tokens.weight"])


def test_same_plan_same_bytes(tmp_path):
    model = save_family("llama", tmp_path / "dense")
    for name in "ab":
        prune(model, plan_for(model), tmp_path / name)
    assert model_digest(tmp_path / "a") == model_digest(tmp_path / "b")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_and_types_stay(tmp_path, dtype):
    whole = AutoModelForCausalLM.from_pretrained(save_family("llama", tmp_path / "fp32"), dtype=dtype)
    whole.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    prune(tmp_path / "dense", plan_for(tmp_path / "dense"), tmp_path / "pruned")
    pruned, info = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert pruned.dtype == dtype
    assert not info["missing_keys"] and not info["unexpected_keys"]
    index = json.loads((tmp_path / "pruned/model.safetensors.index.json").read_text())
    sizes = sum(t.numel() * 2 for f in (tmp_path / "pruned").glob("*.safetensors") for t in load_file(f).values())
    assert index["metadata"]["total_size"] == sizes


def test_tokenizer_travels_and_code_does_not(tmp_path):
    model = save_family("llama", tmp_path / "dense")
    tiny_tokenizer().save_pretrained(model)
    (model / "evil.py").write_text("raise SystemExit")
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    prune(model, plan_for(model), tmp_path / "pruned")
    names = {file.name for file in (tmp_path / "pruned").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "nirvana_plan.json", "modeling_nirvana.py"} <= names
    assert not {"evil.py", "pytorch_model.bin"} & names


def test_foreign_plan_is_refused_unless_shapes_suffice(tmp_path):
    model, other = save_family("llama", tmp_path / "a"), save_family("llama", tmp_path / "b", seed=1)
    with pytest.raises(InputError, match="expected the model sha256"):
        prune(other, plan_for(model), tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()
    prune(other, plan_for(model), tmp_path / "pruned", match_digest=False)
    assert (tmp_path / "pruned/config.json").exists()


def test_truncated_weights_are_refused(tmp_path):
    model = save_family("llama", tmp_path / "dense")
    plan = plan_for(model)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="expected a whole safetensors file"):
        prune(model, plan, tmp_path / "pruned", match_digest=False)


def test_missing_weights_and_missing_tensor(tmp_path):
    model = save_family("llama", tmp_path / "dense")
    (model / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no such file"):
        Stack.open(model)
    AutoModelForCausalLM.from_pretrained(save_family("llama", tmp_path / "deep")).save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(InputError, match=r"model\.layers\.3\.\*: expected parameters of layer 4"):
        Stack.open(model)
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(InputError, match=r"gate_proj\.weight: expected shape \(40, 32\) .* got \(48, 32\)"):
        Stack.open(model)


def test_shard_outside_the_directory_is_refused(tmp_path):
    model = save_family("llama", tmp_path / "dense")
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../secret.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="expected file names beside it"):
        Stack.open(model)


def test_only_an_earlier_checkpoint_is_replaced(tmp_path):
    model = save_family("llama", tmp_path / "home" / "dense")
    plan, before = plan_for(model), model_digest(model)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    (tmp_path / "link").symlink_to(model)
    for target in (model, model.parent, tmp_path / "file", tmp_path / "folder", tmp_path / "link"):
        with pytest.raises(InputError, match="choose another"):
            prune(model, plan, target)
    assert model_digest(model) == before
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "thesis.txt").read_text() == "mine"


def test_an_adapter_does_not_travel(tmp_path):
    model = save_family("llama", tmp_path / "dense")
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    prune(model, plan_for(model), tmp_path / "pruned")
    assert not (tmp_path / "pruned" / "adapter_config.json").exists()


def test_full_disk_leaves_nothing(tmp_path):
    """A real limit on file size, set in a process of its own, stops the writing half-way."""
    model = save_family("llama", tmp_path / "dense")
    plan_for(model).write(tmp_path / "plan.json")
    code = f"""
import resource, signal, sys
from nirvana.errors import InputError
from nirvana.plan import Plan
from nirvana.surgery import prune
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    prune({str(model)!r}, Plan.read({str(tmp_path / "plan.json")!r}), {str(tmp_path / "pruned")!r})
except InputError as error:
    print(error); sys.exit(2)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "the disk became full while the checkpoint was written" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "plan.json"]


def test_small_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    model = save_family("llama", tmp_path / "dense")
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("nirvana.surgery.shutil.disk_usage", lambda path: free)
    with pytest.raises(InputError, match="of free disk for the checkpoint, got 0 MB"):
        prune(model, plan_for(model), tmp_path / "pruned")


def test_failure_keeps_the_old_checkpoint(tmp_path):
    model = save_family("llama", tmp_path / "dense")
    prune(model, plan_for(model), tmp_path / "pruned")
    before = model_digest(tmp_path / "pruned")

    def fail(name):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        prune(model, plan_for(model, seed=1), tmp_path / "pruned", on_tensor=fail)
    assert model_digest(tmp_path / "pruned") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "pruned"]
