"""Surgery: right bytes, whole or nothing."""

import errno
import hashlib
import json
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from exports import with_compensation
from safetensors.torch import load_file, save_file
from tiny import ids_for, logits_of, one_layout_each, random_ids, random_keep, save_family, tiny_tokenizer
from transformers import AutoModelForCausalLM

from nirvana import compensated_weights, compensation
from nirvana.allocation import Allocation
from nirvana.calibration import calibration_digest
from nirvana.checkpoint.safetensors_stream import Shards
from nirvana.compensation import compensate
from nirvana.errors import InputError
from nirvana.files import sha256_directory
from nirvana.loading import load_model
from nirvana.plan import Plan
from nirvana.surgery import prune
from nirvana.walk import Stack, final_hidden_states
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
        allocation=Allocation(0.4),
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


def test_an_adapter_beside_a_model_is_refused(tmp_path):
    """transformers adds it to the weights when it loads the directory; the walk does not."""
    model = save_family("llama", tmp_path / "dense")
    plan = plan_for(model)
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    for refused in (lambda: prune(model, plan, tmp_path / "pruned"), lambda: load_model(model)):
        with pytest.raises(InputError, match=r"files of an adapter beside it \(adapter_config\.json\)"):
            refused()


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


# -- compensation --------------------------------------------------------------------------------------------------


@pytest.fixture
def compensated(tmp_path):
    """A model, a plan that compensates, and the file that it is fitted on."""
    model = save_family("llama", tmp_path / "dense")
    plan = with_compensation(plan_for(model), random_ids(6, 12), tmp_path / "ids.safetensors")
    return model, plan, tmp_path / "ids.safetensors"


def left_over(folder):
    """Return what lies beside the inputs, temporary siblings included."""
    return sorted(path.name for path in folder.iterdir() if path.name not in ("dense", "ids.safetensors"))


def test_a_twin_takes_over_in_the_checkpoint(tmp_path):
    """Neuron 1 of layer 2 repeats neuron 0. Without it, neuron 0's column is the sum of both, all else is sliced."""
    model = save_family("llama", tmp_path / "dense")
    dense = load_file(model / "model.safetensors")
    mlp = "model.layers.2.mlp."
    for matrix in ("gate_proj", "up_proj"):
        dense[f"{mlp}{matrix}.weight"][1] = dense[f"{mlp}{matrix}.weight"][0]
    save_file(dense, model / "model.safetensors", {"format": "pt"})
    sites = Stack.open(model).architecture.sites()
    plan = Plan.build(
        sites,
        {site.name: np.arange(site.units) for site in sites} | {"layers.2.mlp_neuron": np.delete(np.arange(48), 1)},
        model_digest=model_digest(model),
        model_type="llama",
        calibration_digest="sha256:none",
        allocation=Allocation(0.01),
    )
    ids = tmp_path / "ids.safetensors"
    prune(model, with_compensation(plan, random_ids(20, 16), ids, 1e-9), tmp_path / "pruned", calibration=ids)
    pruned, name = load_file(tmp_path / "pruned/model.safetensors"), f"{mlp}down_proj.weight"
    expected = torch.cat([dense[name][:, :1] + dense[name][:, 1:2], dense[name][:, 2:]], dim=1)
    torch.testing.assert_close(pruned[name], expected, rtol=1e-3, atol=1e-3)
    for matrix in ("gate_proj", "up_proj"):
        assert torch.equal(pruned[f"{mlp}{matrix}.weight"], dense[f"{mlp}{matrix}.weight"][[0, *range(2, 48)]])
    assert Plan.read(tmp_path / "pruned").compensation.ridge == 1e-9


@pytest.mark.parametrize("name", [name for name in one_layout_each() if name != "qwen3_moe"])
def test_the_compensated_checkpoint_is_the_compensated_walk(name, tmp_path, monkeypatch):
    monkeypatch.setattr(compensation, "FORWARD_TOKENS", 12)  # one sequence a microbatch: enough of them for a gain
    model, ids = save_family(name, tmp_path / "dense"), ids_for(name, 8, 12)
    stack, file = Stack.open(model), tmp_path / "ids.safetensors"
    sites = stack.architecture.sites()
    plan = Plan.build(
        sites,
        random_keep(sites),
        model_digest=model_digest(model),
        model_type=name,
        calibration_digest="sha256:none",
        allocation=Allocation(0.4),
    )
    prune(model, with_compensation(plan, ids, file), tmp_path / "pruned", calibration=file)
    updates, fresh = dict(compensate(stack, plan.keep, ids, 0.1)), ids_for(name, 2, 9, seed=5)
    assert updates.keys() == compensated_weights.compensated_parameters(stack.architecture)
    walked, uncompensated = (final_hidden_states(stack, fresh, plan.keep, each) for each in (updates, None))
    logits, cap = walked @ stack.head_weight().T, stack.architecture.logit_softcap
    expected = logits if cap is None else cap * torch.tanh(logits / cap)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(load_model(tmp_path / "pruned"), fresh), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(walked, uncompensated, atol=1e-2)


def test_same_plan_and_calibration_same_bytes(compensated, tmp_path):
    model, plan, file = compensated
    layers = []
    prune(model, plan, tmp_path / "a", calibration=file, on_layer=layers.append)
    prune(model, plan, tmp_path / "b", calibration=file, execution="streamed")
    assert sha256_directory(tmp_path / "a") == sha256_directory(tmp_path / "b")
    assert layers == [0, 1, 2] and left_over(tmp_path) == ["a", "b"]


def test_compensation_keeps_shards_and_types(compensated, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(compensated[0], dtype=torch.bfloat16)
    whole.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    plan = with_compensation(plan_for(tmp_path / "shards"), random_ids(6, 12), tmp_path / "ids.safetensors")
    prune(tmp_path / "shards", plan, tmp_path / "pruned", calibration=tmp_path / "ids.safetensors")
    stack, checkpoint = Stack.open(tmp_path / "shards"), Stack.open(tmp_path / "pruned")
    assert len(set(checkpoint.weights.file_of.values())) > 2
    for name, matrix in compensate(stack, plan.keep, random_ids(6, 12), 0.1):
        assert torch.equal(checkpoint.weights[name], matrix.bfloat16())


def test_a_plan_without_compensation_reads_no_calibration(tmp_path):
    model = save_family("llama", tmp_path / "dense")
    prune(model, plan_for(model), tmp_path / "a")
    prune(model, plan_for(model), tmp_path / "b", calibration=tmp_path / "nowhere")
    assert sha256_directory(tmp_path / "a") == sha256_directory(tmp_path / "b")


def test_a_missing_calibration_file_is_asked_for(compensated, tmp_path):
    model, plan, file = compensated
    digest = calibration_digest((load_file(file)["input_ids"],))
    with pytest.raises(InputError, match=f"expected the token ids {digest} .* --calibration FILE"):
        prune(model, plan, tmp_path / "new" / "pruned")
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"input_ids": random_ids(6, 12, seed=1)}, "expected the token ids sha256:.* got sha256:"),
        ({"input_ids": random_ids(12, 6)}, "expected the token ids sha256:.* got sha256:"),
        (
            {"input_ids": random_ids(6, 12).int()},
            r"expected input_ids as int64, .* got torch.int32",
        ),
        ({"input_ids": random_ids(6, 12)[None]}, r"got torch.int64, \[1, 6, 12\]"),
        ({"tokens": random_ids(6, 12)}, "expected input_ids, with decoder_input_ids alike or without"),
    ],
)
def test_other_calibration_files_are_refused(compensated, tmp_path, tensors, said):
    model, plan, file = compensated
    save_file(tensors, file)
    with pytest.raises(InputError, match=said):
        prune(model, plan, tmp_path / "new" / "pruned", calibration=file)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("family", "ids", "said"),
    [
        ("llama", torch.full((2, 4), 512), "below the model's vocabulary size 512"),
        ("llama", torch.zeros(0, 4, dtype=torch.int64), "expected sequences of token ids, got none"),
        ("t5-relu-tied", torch.zeros(2, 4, dtype=torch.int64), "an encoder-decoder needs input_ids and decoder"),
        ("qwen3_moe", torch.zeros(2, 4, dtype=torch.int64), "expected an output projection that is a module of its"),
    ],
)
def test_what_cannot_be_compensated_is_refused_first(family, ids, said, tmp_path):
    model, file = save_family(family, tmp_path / "dense"), tmp_path / "ids.safetensors"
    sites = Stack.open(model).architecture.sites()
    origin = {"model_digest": model_digest(model), "model_type": family, "calibration_digest": "sha256:none"}
    plan = Plan.build(sites, random_keep(sites), **origin, allocation=Allocation(0.4))
    with pytest.raises(InputError, match=said):
        prune(model, with_compensation(plan, ids, file), tmp_path / "new" / "pruned", calibration=file)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_stopped_between_two_layers_leaves_nothing(compensated, tmp_path, stop):
    model, plan, file = compensated

    def fail(layer):
        (folder,) = tmp_path.glob(".pruned.*.tmp")
        assert (folder / "model.safetensors").is_file()
        raise stop

    with pytest.raises(stop):
        prune(model, plan, tmp_path / "pruned", calibration=file, on_layer=fail)
    assert left_over(tmp_path) == []


def test_killed_between_two_layers_leaves_nothing_that_stays(compensated, tmp_path):
    """No process can tidy up after kill -9: the next one at that place does."""
    model, plan, file = compensated
    plan.write(tmp_path / "plan.json")
    code = """
import os, signal, sys
from nirvana.plan import Plan
from nirvana.surgery import prune
model, plan, target, ids = sys.argv[1:]
prune(model, Plan.read(plan), target, calibration=ids, on_layer=lambda layer: os.kill(os.getpid(), signal.SIGKILL))
"""
    target = tmp_path / "pruned"
    done = subprocess.run([sys.executable, "-c", code, model, tmp_path / "plan.json", target, file], check=False)
    assert done.returncode == -9 and not target.exists()
    assert len(list(tmp_path.glob(".pruned.*.tmp"))) == 1
    prune(model, plan, target, calibration=file)
    assert left_over(tmp_path) == ["plan.json", "pruned"]


def test_full_disk_while_compensating(compensated, tmp_path, monkeypatch):
    model, plan, file = compensated

    def fail(shards, name, tensor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Shards, "put", fail)
    with pytest.raises(InputError, match="the disk became full while the checkpoint was written"):
        prune(model, plan, tmp_path / "pruned", calibration=file)
    assert left_over(tmp_path) == []


def test_a_solution_that_the_type_cannot_hold_is_refused(compensated, tmp_path, monkeypatch):
    """float16 ends at 65504."""
    model, plan, file = compensated
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16)
    whole.save_pretrained(model)
    real = compensated_weights.compensate
    monkeypatch.setattr(
        compensated_weights,
        "compensate",
        lambda *args, **rest: ((name, 1e6 * matrix) for name, matrix in real(*args, **rest)),
    )
    with pytest.raises(InputError, match=r"o_proj.weight: expected compensated values that torch.float16 can hold"):
        prune(model, plan, tmp_path / "pruned", calibration=file, match_digest=False)
    assert left_over(tmp_path) == []


def test_digest_by_hand():
    """Type, shape and bytes, stack by stack: plans of earlier releases keep their meaning."""
    ids = torch.tensor([[1, 2], [3, 4]])
    expected = hashlib.sha256(b"int64(2, 2)" + struct.pack("<4q", 1, 2, 3, 4)).hexdigest()
    assert calibration_digest(ids) == calibration_digest((ids,)) == f"sha256:{expected}"
    assert calibration_digest((ids, ids)) != calibration_digest(ids)
