"""Exports load in stock tools and say what the dense model, masked by their plan, says. Otherwise there are none."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exports import exported, left_over, make_checkpoint, slow_but, with_compensation, write_plan
from safetensors.torch import load_file, save_file
from tiny import (
    all_families,
    ids_for,
    logits_of,
    masked_dense,
    random_keep,
    save_family,
)
from typer.testing import CliRunner

from nirvana import compensation
from nirvana.checkpoint.digests import DIGESTS_NAME
from nirvana.cli import app
from nirvana.errors import InputError
from nirvana.export import source as export_source
from nirvana.export.export import EXPORT_NAME, Options, export_checkpoint
from nirvana.export.parity import compare, masked_logits
from nirvana.files import sha256_directory
from nirvana.loading import load_model
from nirvana.masking import masked_stack
from nirvana.plan import PLAN_NAME, Plan
from nirvana.surgery import prune
from nirvana.walk import Stack
from nirvana.weights import model_digest


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def own_llama(llama, tmp_path):
    """Return a copy that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "llama", ignore=shutil.ignore_patterns("hf*", "padded*", "uniform*")))


# -- every family ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but(("llama", "t5-relu-tied"), all_families()))
def test_says_what_the_masked_dense_model_says(name, tmp_path):
    root = make_checkpoint(name, tmp_path)
    ids = ids_for(name, 1, 9)
    # some of its layers have experts, some one common MLP: no counts are equal in all of them
    formats = ("hf", "padded") if name == "qwen3_moe" else ("hf", "uniform", "padded")
    for to in formats:
        parity = exported(root, to).parity
        assert parity.max_abs_difference <= parity.tolerance < 1e-2
        keep = Plan.read(root / to / PLAN_NAME).keep
        expected = logits_of(masked_dense(root / "dense", keep), ids)
        model = load_model(root / to)
        torch.testing.assert_close(logits_of(model, ids), expected, atol=1e-4, rtol=0)
        if to != "hf":
            assert type(model).__module__.startswith("transformers.")


@pytest.mark.parametrize("name", slow_but(("llama", "t5-relu-tied"), all_families()))
def test_the_reference_is_the_masked_dense_model(name, tmp_path):
    model = save_family(name, tmp_path / "dense")
    sites = Stack.open(model).architecture.sites()
    keep, ids = random_keep(sites), ids_for(name, 1, 9)
    expected = logits_of(masked_dense(model, keep), ids)
    positions = np.array([0, 3, expected.shape[1] - 1])
    found = masked_logits(model, keep, ids, positions)
    torch.testing.assert_close(found, expected[0, positions], atol=1e-4, rtol=0)


def test_masking_zeroes_exactly_the_pruned_units(tmp_path):
    model = save_family("llama", tmp_path)
    keep = {site.name: np.arange(site.units) for site in Stack.open(model).architecture.sites()}
    keep["layers.0.kv_group"] = np.array([1])
    weights = masked_stack(Stack.open(model), keep).weights
    masked, stored = weights["model.layers.0.self_attn.q_proj.weight"], load_file(model / "model.safetensors")
    assert not masked[:16].any()  # two query heads of eight rows
    assert torch.equal(masked[16:], stored["model.layers.0.self_attn.q_proj.weight"][16:])
    assert torch.equal(
        weights["model.layers.1.self_attn.q_proj.weight"], stored["model.layers.1.self_attn.q_proj.weight"]
    )


# -- the formats -------------------------------------------------------------------------------------------------


def test_padded_is_the_dense_file_with_zeros(llama):
    exported(llama, "padded")
    dense, padded = (load_file(llama / name / "model.safetensors") for name in ("dense", "padded"))
    masked = dict(masked_dense(llama / "dense", Plan.read(llama / "pruned" / PLAN_NAME).keep).named_parameters())
    assert {name: tensor.shape for name, tensor in dense.items()} == {n: t.shape for n, t in padded.items()}
    for name, tensor in padded.items():
        assert torch.equal(tensor, masked[name]), name
    before, after = (json.loads((llama / name / "config.json").read_text()) for name in ("dense", "padded"))
    earlier = {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "float32"}  # for readers of an earlier age
    assert after == before | earlier


def test_padded_zeroes_biases(tmp_path):
    root = make_checkpoint("llama-untied-biases", tmp_path)
    exported(root, "padded")
    keep = Plan.read(root / "pruned" / PLAN_NAME).keep["layers.0.mlp_neuron"]
    bias = load_file(root / "padded/model.safetensors")["model.layers.0.mlp.up_proj.bias"]
    assert torch.nonzero(bias).flatten().tolist() == keep.tolist()


def test_padded_keeps_shards(tmp_path):
    root = make_checkpoint("llama", tmp_path)
    model = load_model(root / "dense")
    (root / "dense/model.safetensors").unlink()
    model.save_pretrained(root / "dense", max_shard_size="40KB")
    prune(root / "dense", write_plan(root, {}), root / "pruned")
    for to in ("padded", "hf"):
        exported(root, to)
        assert len(list((root / to).glob("*.safetensors"))) > 1
        assert exported(root, to).parity.passed


def test_uniform_has_its_own_plan(llama):
    exported(llama, "uniform")
    plan = Plan.read(llama / "uniform" / PLAN_NAME)
    assert plan.allocation.scope == "uniform"
    assert len({len(site.keep_indices) for site in plan.sites if site.module == "mlp"}) == 1
    config = json.loads((llama / "uniform/config.json").read_text())
    assert config["model_type"] == "llama" and "auto_map" not in config


LOAD = """
import sys; sys.modules["nirvana"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({name!r}, trust_remote_code={trust}).eval()
print(model(torch.tensor([[3, 5, 7, 11]])).logits[0, -1].argmax().item(), type(model).__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "trust", "class_name"),
    [
        ("hf", True, "NirvanaLlamaForCausalLM"),
        ("uniform", False, "LlamaForCausalLM"),
        ("padded", False, "LlamaForCausalLM"),
    ],
)
def test_loads_where_nirvana_is_not_installed(to, trust, class_name, llama):
    exported(llama, to)
    code = LOAD.format(name=to, trust=trust)
    environment = os.environ | {"HF_HOME": str(llama / "hf_home"), "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=llama, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = masked_dense(llama / "dense", Plan.read(llama / to / PLAN_NAME).keep)
    token = reference(torch.tensor([[3, 5, 7, 11]])).logits[0, -1].argmax().item()
    assert done.stdout.split() == [str(token), class_name]


@pytest.mark.parametrize("to", ["hf", "uniform", "padded"])
def test_same_bytes_every_time(to, llama):
    exported(llama, to, to + "-once")
    exported(llama, to, to + "-twice")
    assert sha256_directory(llama / f"{to}-once") == sha256_directory(llama / f"{to}-twice")


def test_metadata_holds_tolerance_and_difference(llama):
    parity = exported(llama, "hf").parity
    noted = json.loads((llama / "hf" / EXPORT_NAME).read_text())
    assert noted["format"] == "hf"
    assert noted["parity"]["max_abs_difference"] == parity.max_abs_difference
    assert 0 < noted["parity"]["tolerance"] < 1e-2
    assert noted["parity"]["top1_agreement"] == 1 and noted["parity"]["positions"] == 128
    assert noted["model"]["digest"] == model_digest(llama / "dense")


def test_an_earlier_export_is_replaced(own_llama):
    exported(own_llama, "padded", "out")
    exported(own_llama, "hf", "out")
    assert json.loads((own_llama / "out" / EXPORT_NAME).read_text())["format"] == "hf"
    assert left_over(own_llama) == ["out"]


def test_the_padded_weights_are_the_checkpoints_own(own_llama):
    """What was trained or compensated after pruning survives, were it verified against the same reference."""
    file = own_llama / "pruned/model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] += 1e-6
    save_file(weights, file, {"format": "pt"})
    file.with_name(DIGESTS_NAME).unlink()
    exported(own_llama, "padded")
    padded = load_file(own_llama / "padded/model.safetensors")
    assert torch.equal(padded["model.norm.weight"], weights["model.norm.weight"])


# -- compensated checkpoints -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compensated(tmp_path_factory):
    return compensated_checkpoint("llama", tmp_path_factory.mktemp("compensated"))


def compensated_checkpoint(name, root: Path) -> Path:
    """As `make_checkpoint`, with a compensation that changes much."""
    make_checkpoint(name, root)
    plan = with_compensation(Plan.read(root / "pruned"), ids_for(name, 8, 12), root / "pruned/fitted.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compensation, "FORWARD_TOKENS", 12)  # one sequence a microbatch: enough of them for a gain
        prune(root / "dense", plan, root / "again", calibration=root / "pruned/fitted.safetensors")
    shutil.rmtree(root / "pruned")
    (root / "again").rename(root / "pruned")
    return root


def logits_by(path: Path, ids):
    with torch.no_grad():
        return logits_of(load_model(path), ids)


@pytest.mark.parametrize("name", slow_but(("llama",), ["llama", "phi3", "gemma3_text", "t5-relu-tied"]))
def test_compensated_exports_say_what_the_checkpoint_says(name, tmp_path):
    root, ids = compensated_checkpoint(name, tmp_path), ids_for(name, 1, 9)
    expected = logits_by(root / "pruned", ids)
    masked = logits_of(masked_dense(root / "dense", Plan.read(root / "pruned").keep), ids)
    assert not torch.allclose(expected, masked, atol=0.1)
    for to in ("hf", "padded"):
        done = exported(root, to)
        assert done.parity.passed and done.note is None
        torch.testing.assert_close(logits_by(root / to, ids), expected, atol=1e-4, rtol=0)
        assert Plan.read(root / to).compensation == Plan.read(root / "pruned").compensation
        noted = json.loads((root / to / EXPORT_NAME).read_text())
        assert (
            "what compensation solved for taken from the checkpoint" in noted["parity"]["reference"]
            and "note" not in noted
        )


def test_compensated_gguf(compensated):
    pytest.importorskip("gguf")
    assert exported(compensated, "gguf").parity.passed


def test_uniform_drops_the_compensation_and_says_so(compensated):
    done = exported(compensated, "uniform")
    assert Plan.read(compensated / "uniform").compensation is None
    assert done.note == json.loads((compensated / "uniform" / EXPORT_NAME).read_text())["note"]
    assert done.note.startswith("not compensated: ")
    result = command(compensated, "--to", "uniform", "--saliency", compensated / "saliency.safetensors")
    assert result.exit_code == 0 and result.stdout.strip().endswith(done.note)


def test_other_weights_of_a_compensated_checkpoint_are_still_compared(compensated, tmp_path):
    root = Path(shutil.copytree(compensated, tmp_path / "own", ignore=shutil.ignore_patterns("hf", "gguf", "uniform")))
    damage(root, "model.layers.1.mlp.up_proj.weight", 1.05)
    with pytest.raises(InputError, match="masked by the plan"):
        exported(root, "hf", "out")
    assert not (root / "out").exists()


def test_a_compensated_checkpoint_whose_plan_does_not_say_so_is_refused(compensated, tmp_path):
    root = Path(shutil.copytree(compensated, tmp_path / "own", ignore=shutil.ignore_patterns("hf", "gguf", "uniform")))
    replace(Plan.read(root / "pruned"), compensation=None).write(root / "pruned" / PLAN_NAME)
    (root / "pruned" / DIGESTS_NAME).unlink()
    with pytest.raises(InputError, match="masked by the plan"):
        exported(root, "hf", "out")


def test_updates_replace_the_kept_columns(tmp_path):
    model = save_family("llama", tmp_path)
    dense = Stack.open(model)
    keep = {site.name: np.arange(site.units) for site in dense.architecture.sites()}
    keep |= {"layers.0.mlp_neuron": np.array([1, 4])}
    partly, wholly, gain = (
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.norm.weight",
    )
    updates = {partly: torch.full((32, 2), 7.0), wholly: torch.full((32, 48), 8.0), gain: torch.full((32,), 9.0)}
    weights = masked_stack(dense, keep, updates).weights
    expected = torch.zeros(32, 48)
    expected[:, [1, 4]] = 7.0
    assert torch.equal(weights[partly], expected)
    assert all(torch.equal(weights[name], updates[name]) for name in (wholly, gain))


# -- comparing ---------------------------------------------------------------------------------------------------


def test_compare_by_hand():
    reference = torch.tensor([[1.0, -4.0, 2.0], [0.0, 3.0, 1.0]])
    other = torch.tensor([[1.0, -4.5, 2.0], [3.25, 3.0, -torch.inf]])
    arguments = {"quantity": "logits", "runtime": "a hand", "ids": torch.tensor([[1, 2]])}
    parity = compare(reference, other, relative_tolerance=0.5, **arguments)
    assert (parity.max_abs_difference, parity.tolerance, parity.top1_agreement) == (3.25, 2.0, 0.5)
    assert not parity.passed
    assert compare(reference, reference, relative_tolerance=1e-6, **arguments).passed
    assert not compare(reference, reference * torch.nan, relative_tolerance=1.0, **arguments).passed


# -- bad input ---------------------------------------------------------------------------------------------------


def damage(root: Path, name: str, factor: float) -> None:
    file = root / "pruned/model.safetensors"
    weights = load_file(file)
    weights[name] = weights[name] * factor
    save_file(weights, file, {"format": "pt"})
    (root / "pruned" / DIGESTS_NAME).unlink()  # the comparison has to find it by itself


@pytest.mark.parametrize("to", ["hf", "padded"])
def test_weights_that_are_not_the_plans_are_refused(to, own_llama):
    damage(own_llama, "model.layers.1.mlp.down_proj.weight", 1.05)
    with pytest.raises(InputError, match=r"expected the logits of the dense model masked by the plan, got max"):
        exported(own_llama, to)
    assert left_over(own_llama) == []


def test_another_plan_of_the_same_counts_is_refused(own_llama):
    path = own_llama / "pruned" / PLAN_NAME
    plan = json.loads(path.read_text())
    plan["sites"][2]["keep"] = "1" if plan["sites"][2]["keep"] == "0" else "0"
    path.write_text(json.dumps(plan))
    path.with_name(DIGESTS_NAME).unlink()
    with pytest.raises(InputError, match="masked by the plan"):
        exported(own_llama, "hf")
    assert left_over(own_llama) == []


def test_nan_is_refused(own_llama):
    damage(own_llama, "model.norm.weight", float("nan"))
    with pytest.raises(InputError, match="masked by the plan"):
        exported(own_llama, "hf")
    assert left_over(own_llama) == []


def test_plan_and_weights_of_different_sizes(own_llama):
    write_plan(own_llama, {"layers.0.kv_group": np.arange(2), "layers.0.mlp_neuron": np.arange(3)})
    with pytest.raises(InputError, match=r"expected 3 units at layers\.0\.mlp_neuron as its plan says, got 29"):
        exported(own_llama, "hf")


def test_missing_plan(own_llama):
    (own_llama / "pruned" / PLAN_NAME).unlink()
    with pytest.raises(InputError, match=r"expected a pruned checkpoint with nirvana_plan\.json"):
        exported(own_llama, "hf")
    assert left_over(own_llama) == []


def test_another_dense_model(own_llama, tmp_path):
    save_family("llama", tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="apply the plan to the model it was made for"):
        export_checkpoint(own_llama / "pruned", "padded", tmp_path / "other", own_llama / "out")
    save_family("llama-mha", tmp_path / "another")
    with pytest.raises(InputError, match="belongs to another model"):
        export_checkpoint(own_llama / "pruned", "padded", tmp_path / "another", own_llama / "out")


def test_uniform_without_saliency(own_llama):
    with pytest.raises(InputError, match="give --saliency FILE"):
        exported(own_llama, "uniform", options=Options())
    (own_llama / "saliency.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="expected unit saliency as safetensors"):
        exported(own_llama, "uniform")
    assert left_over(own_llama) == []


def test_uniform_of_a_plan_without_settings(own_llama):
    path = own_llama / "pruned" / PLAN_NAME
    plan = json.loads(path.read_text())
    plan |= {"schema_version": 1, "requested_ratio": 0.4, "parameters": {"pruning_ratio": 0.4}}
    del plan["allocation"]
    path.write_text(json.dumps(plan))
    path.with_name(DIGESTS_NAME).unlink()
    with pytest.raises(InputError, match="pruning_ratio, gamma and round_to"):
        exported(own_llama, "uniform")
    assert left_over(own_llama) == []


def test_targets_that_hold_something_else(own_llama):
    (own_llama / "mine").mkdir()
    (own_llama / "mine/thesis.txt").write_text("years")
    (own_llama / "file").write_text("years")
    for target in ("mine", "file", "pruned", "dense", "."):
        with pytest.raises(InputError, match="choose another"):
            exported(own_llama, "hf", target)
    assert (own_llama / "mine/thesis.txt").read_text() == "years"


def test_too_small_a_disk(own_llama, monkeypatch):
    usage = shutil.disk_usage(own_llama)._replace(free=1000)
    monkeypatch.setattr(export_source.shutil, "disk_usage", lambda path: usage)
    for to in ("hf", "padded", "uniform", "gguf"):
        with pytest.raises(InputError, match="MB of free disk"):
            exported(own_llama, to)
    assert left_over(own_llama) == []


# -- tokens to compare on ----------------------------------------------------------------------------------------


def test_no_tokenizer_asks_for_ids(own_llama):
    for file in [*(own_llama / "pruned").glob("tokenizer*"), own_llama / "pruned" / DIGESTS_NAME]:
        file.unlink()
    with pytest.raises(InputError, match="give token ids with --ids FILE"):
        exported(own_llama, "hf")
    (own_llama / "pruned/ids.json").write_text("[1, 2, 3, 4, 5]")
    assert exported(own_llama, "hf", ids=own_llama / "pruned/ids.json").parity.positions == 5


def test_tokens_from_safetensors_and_text(own_llama):
    file, text = own_llama / "pruned/ids.safetensors", own_llama / "pruned/text.txt"
    save_file({"input_ids": torch.arange(60).view(2, 3, 10)}, file)
    assert exported(own_llama, "hf", ids=file).parity.positions == 10
    text.write_text("The great nation protects the river.")
    assert 2 <= exported(own_llama, "hf", text=text).parity.positions < 40


@pytest.mark.parametrize("content", ["[1, 2", '["a"]', "[1]", "7", "[-1, 2]", '{"a": [1, 2]}', "[1, 5000]", "[1.5, 2]"])
def test_bad_ids(content, own_llama):
    file = own_llama / "pruned/ids.json"
    file.write_text(content)
    with pytest.raises(InputError):
        exported(own_llama, "hf", ids=file)
    assert left_over(own_llama) == []


def test_bad_text(own_llama):
    with pytest.raises(InputError, match="expected a UTF-8 text"):
        exported(own_llama, "hf", text=own_llama / "nowhere.txt")


# -- the command -------------------------------------------------------------------------------------------------


def command(root: Path, *arguments):
    full = ["export", root / "pruned", "--model", root / "dense", *arguments]
    return CliRunner().invoke(app, [str(argument) for argument in full])


def test_command(own_llama):
    result = command(own_llama, "--to", "padded")
    assert result.exit_code == 0, result.stderr
    assert "max |difference| of logits" in result.stdout and "tolerance" in result.stdout
    assert left_over(own_llama) == ["pruned-padded"]


def test_command_says_one_line_when_something_is_wrong(own_llama):
    for arguments in (["--to", "uniform"], ["--to", "onnx"], ["--to", "hf", "--ids", own_llama / "nowhere"]):
        result = command(own_llama, *arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert left_over(own_llama) == []
