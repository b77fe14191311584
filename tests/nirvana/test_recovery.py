"""Recovery: the right loss and schedule, adapters where units live, and the same bytes whether killed or not."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ids_for, logits_of, one_layout_each, random_ids, random_keep, save_family, tiny_corpus, tiny_tokenizer

from nirvana.adapter import ADAPTER_NAME, Adapter, adapted_modules, attach, merge
from nirvana.allocation import Allocation
from nirvana.architectures.registry import describe
from nirvana.checkpoint.digests import DIGESTS_NAME
from nirvana.errors import InputError
from nirvana.loading import load_model
from nirvana.plan import Plan
from nirvana.recovery import (
    MICROBATCH_TOKENS,
    Recipe,
    is_curve_point,
    learning_rate_at,
    recover,
    rows_of,
    token_losses,
)
from nirvana.surgery import prune
from nirvana.walk import Stack
from nirvana.weights import WeightFiles, model_digest

RECIPE = Recipe(
    tokens=320,
    seed=0,
    rank=4,
    alpha=8.0,
    learning_rate=0.01,
    warmup=0.1,
    distillation=0.5,
    sequence_length=16,
    batch=4,
    curve_every=128,
)


def pruned_of(dense, checkpoint):
    """Prune a saved model at random, layers of different sizes, and return the checkpoint."""
    sites = Stack.open(dense).architecture.sites()
    whole = next(site for site in sites if site.module == "attention")
    keep = random_keep(sites) | {whole.name: np.arange(whole.units)}
    plan = Plan.build(
        sites,
        keep,
        model_digest=model_digest(dense),
        model_type="any",
        calibration_digest="sha256:none",
        allocation=Allocation(0.4),
    )
    prune(dense, plan, checkpoint)
    return checkpoint


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_family("llama", tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def pruned(dense, tmp_path_factory):
    return pruned_of(dense, tmp_path_factory.mktemp("pruned") / "checkpoint")


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """Token ids of text that can be learned: sequences to train on and others to measure on."""
    corpus = tiny_corpus(tmp_path_factory.mktemp("corpus"), documents=8)
    texts = [file.read_text() for file in sorted(corpus.glob("*.txt"))]
    stream = torch.tensor(tiny_tokenizer()(" ".join(texts))["input_ids"][: 48 * 16]).view(48, 16)
    return stream[:40], stream[40:]


# -- loss, schedule, order --------------------------------------------------------------------------------------------


def test_losses_by_hand():
    student = torch.tensor([[1.0, 3.0], [1.0, 1.0]]).log()  # 1/4 3/4, 1/2 1/2
    dense = torch.tensor([[1.0, 1.0], [1.0, 1.0]]).log()
    nll, kl = token_losses(student, torch.tensor([0, 1]), dense)
    assert nll.tolist() == pytest.approx([math.log(4), math.log(2)], rel=1e-6)
    assert kl.tolist() == pytest.approx([0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75), 0.0], abs=1e-7)
    assert token_losses(student, torch.tensor([0, 1]))[1] is None


def test_the_rate_rises_linearly_and_falls_as_a_cosine():
    recipe = replace(RECIPE, tokens=64 * 12, warmup=0.25, learning_rate=2.0)
    assert recipe.steps == 12
    rates = [learning_rate_at(step, recipe) for step in range(12)]
    assert rates[:3] == pytest.approx([2 / 3, 4 / 3, 2.0])
    assert rates[3:] == pytest.approx([1 + math.cos(math.pi * n / 9) for n in range(9)])
    assert learning_rate_at(0, replace(recipe, warmup=0.0)) == 2.0
    assert learning_rate_at(11, replace(recipe, warmup=1.0)) == 2.0


def test_every_pass_over_the_text_takes_each_sequence_once():
    taken = [row for step in range(15) for row in rows_of(step, 20, RECIPE)]
    passes = [taken[:20], taken[20:40], taken[40:]]
    assert all(sorted(each) == list(range(20)) for each in passes)
    assert len(set(map(tuple, passes))) == 3
    assert rows_of(0, 20, replace(RECIPE, seed=1)) != taken[:4]
    assert sorted(rows_of(0, 3, RECIPE)[:3]) == [0, 1, 2]  # fewer sequences than a batch


def test_the_curve_has_a_point_at_each_multiple_and_at_the_end():
    assert [step for step in range(5) if is_curve_point(step, RECIPE)] == [1, 3, 4]  # 64 tokens a step: 128, 256, 320
    assert [step for step in range(5) if is_curve_point(step, replace(RECIPE, curve_every=100))] == [1, 3, 4]
    assert [step for step in range(5) if is_curve_point(step, replace(RECIPE, curve_every=10**9))] == [4]


@pytest.mark.parametrize("distillation", [0.0, 0.3])
def test_training_is_what_a_plain_loop_does(dense, pruned, sentences, distillation):
    """Reference: peft and transformers' own loss, all positions of a batch at once."""
    text, heldout = sentences
    recipe = replace(RECIPE, tokens=192, distillation=distillation, sequence_length=16, batch=4)
    found = recover(dense, pruned, text, heldout, recipe)

    model, teacher = load_model(pruned), load_model(dense)
    student = attach(model, describe(pruned), recipe.rank, recipe.alpha, recipe.seed)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0)
    for step in range(3):
        ids = text[rows_of(step, len(text), recipe)]
        output = student(input_ids=ids, labels=ids)
        with torch.no_grad():
            p = teacher(ids).logits[:, :-1].softmax(-1)
        q = output.logits[:, :-1].softmax(-1)
        kl = (p * (p / q).log()).sum(-1).mean()
        ((1 - distillation) * output.loss + distillation * kl).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, recipe)
        optimizer.step()
        optimizer.zero_grad()
    expected = Adapter.of(student, recipe.rank, recipe.alpha).matrices
    assert expected.keys() == found.adapter.matrices.keys()
    for name, matrix in expected.items():
        # Adam divides by the gradient's size: what is noise in a gradient of nearly zero shows in its first steps
        torch.testing.assert_close(found.adapter.matrices[name], matrix, atol=2e-4, rtol=1e-3)
    with torch.no_grad():
        loss = float(student(input_ids=heldout, labels=heldout).loss)
    assert found.curve[-1].heldout_loss == pytest.approx(loss, rel=1e-4)


def test_a_batch_in_parts_gives_the_gradient_of_the_whole(dense, pruned, monkeypatch):
    text, heldout = random_ids(8, 16), random_ids(2, 16, seed=1)
    whole = recover(dense, pruned, text, heldout, RECIPE)
    assert RECIPE.tokens_a_step <= MICROBATCH_TOKENS
    monkeypatch.setattr("nirvana.recovery.MICROBATCH_TOKENS", 16)
    parts = recover(dense, pruned, text, heldout, RECIPE)
    assert parts.curve[-1].training_loss == pytest.approx(whole.curve[-1].training_loss, rel=1e-4)


def test_recovery_lowers_both_losses_and_measures_from_the_pruned_model(dense, pruned, sentences):
    text, heldout = sentences
    found = recover(dense, pruned, text, heldout, replace(RECIPE, tokens=64 * 30, curve_every=640))
    assert [point.tokens for point in found.curve] == [0, 640, 1280, 1920]
    with torch.no_grad():
        before = float(load_model(pruned)(input_ids=heldout, labels=heldout).loss)
        of_dense = float(load_model(dense)(input_ids=heldout, labels=heldout).loss)
    assert found.curve[0].heldout_loss == pytest.approx(before, rel=1e-5)
    assert found.dense_loss == pytest.approx(of_dense, rel=1e-5)
    assert found.curve[0].training_loss is None
    assert found.curve[-1].heldout_loss < found.curve[0].heldout_loss - 0.5
    assert found.curve[-1].training_loss < found.curve[1].training_loss


def test_distillation_alone_comes_nearer_to_the_dense_model(dense, pruned):
    text, heldout = random_ids(64, 16), random_ids(8, 16, seed=1)
    recipe = replace(RECIPE, tokens=64 * 30, curve_every=10**6)
    taught = recover(dense, pruned, text, heldout, replace(recipe, distillation=1.0))
    print(taught.curve)
    assert taught.curve[-1].heldout_kl < 0.85 * taught.curve[0].heldout_kl
    alone = recover(dense, pruned, text, heldout, replace(recipe, distillation=0.0))
    assert alone.curve[-1].heldout_kl is None


# -- killed, and begun again ------------------------------------------------------------------------------------------


class KilledError(Exception):
    """Stands for a signal."""


def test_a_killed_run_goes_on_to_the_same_bytes(dense, pruned, sentences, tmp_path):
    text, heldout = sentences
    recipe = replace(RECIPE, tokens=64 * 9)
    whole = recover(dense, pruned, text, heldout, recipe)
    whole.adapter.save(tmp_path / "whole")
    state = tmp_path / "state.safetensors"
    seen: list[int] = []

    def killed_after(tokens):
        def on_step(done):
            seen.append(done)
            if done == tokens:
                raise KilledError

        return on_step

    for tokens in (64, 192, 448):  # before the first state, after one, after several
        with pytest.raises(KilledError):
            recover(dense, pruned, text, heldout, recipe, state_file=state, on_step=killed_after(tokens))
    resumed = recover(dense, pruned, text, heldout, recipe, state_file=state, on_step=seen.append)
    assert seen == [0, 64, 0, 64, 128, 192, 128, 192, 256, 320, 384, 448, 384, 448, 512, 576]
    assert resumed.curve == whole.curve
    resumed.adapter.save(tmp_path / "resumed")
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "resumed" / file.name).read_bytes(), file.name
    assert not list(tmp_path.glob(".*"))
    # a finished state: nothing is left to do
    assert recover(dense, pruned, text, heldout, recipe, state_file=state).curve == whole.curve


@pytest.mark.parametrize("damage", ["cut off", "other parameters", "no position"])
def test_a_state_that_is_not_whole_is_not_used(dense, pruned, sentences, tmp_path, damage, caplog):
    text, heldout = sentences
    state = tmp_path / "state.safetensors"
    whole = recover(dense, pruned, text, heldout, RECIPE, state_file=state)
    tensors = load_file(state)
    if damage == "cut off":
        state.write_bytes(state.read_bytes()[:-10])
    elif damage == "other parameters":
        tensors.popitem()
        save_file(tensors, state, {"position": json.dumps({"step": 2, "curve": []})})
    else:
        save_file(tensors, state)
    steps: list[int] = []
    again = recover(dense, pruned, text, heldout, RECIPE, state_file=state, on_step=steps.append)
    assert steps[0] == 0 and "starting over" in caplog.text
    assert again.curve == whole.curve


# -- adapters ---------------------------------------------------------------------------------------------------------


def trained(name, tmp_path, **changes):
    """Return dense model, pruned checkpoint and a briefly trained adapter of a layout."""
    dense = save_family(name, tmp_path / "dense")
    checkpoint = pruned_of(dense, tmp_path / "pruned")
    recipe = replace(RECIPE, learning_rate=0.05, distillation=0.0, **changes)
    found = recover(dense, checkpoint, ids_for(name, 8, 16), ids_for(name, 2, 16, seed=1), recipe)
    return dense, checkpoint, found


@pytest.mark.parametrize(
    "name", [name if name == "llama" else pytest.param(name, marks=pytest.mark.slow) for name in one_layout_each()]
)
def test_merged_is_what_peft_merges(name, tmp_path):
    _, checkpoint, found = trained(name, tmp_path)
    model = load_model(checkpoint)
    owned = {slot.parameter for site in describe(checkpoint).sites() for slot in site.weight_slots}
    adapted = {f"{module}.weight" for module in adapted_modules(model, describe(checkpoint))}
    assert {f"{module}.weight" for module in found.adapter.modules} == adapted
    assert all(".experts." in parameter for parameter in owned - adapted)

    found.adapter.save(tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    merge(checkpoint, Adapter.load(tmp_path / "adapter"), tmp_path / "merged")
    before, after = WeightFiles(checkpoint), WeightFiles(tmp_path / "merged")
    assert set(before) == set(after)
    changed = set()
    for parameter in before:
        assert before.shape(parameter) == after.shape(parameter) and before.dtype(parameter) == after.dtype(parameter)
        if not torch.equal(before[parameter], after[parameter]):
            changed.add(parameter)
    assert changed == adapted

    from peft import PeftModel

    ids = ids_for(name, 2, 9, seed=3)
    with torch.no_grad():
        beside = PeftModel.from_pretrained(model, tmp_path / "adapter")
        merged = load_model(tmp_path / "merged")
        torch.testing.assert_close(logits_of(merged, ids), logits_of(beside, ids), atol=2e-4, rtol=1e-3)
        by_peft = beside.merge_and_unload()
        assert torch.equal(logits_of(merged, ids), logits_of(by_peft, ids))
        pruned = load_model(checkpoint)
        assert not torch.allclose(logits_of(merged, ids), logits_of(pruned, ids), atol=1e-2)


def test_a_merged_checkpoint_keeps_types_shards_and_companions(tmp_path):
    from transformers import AutoModelForCausalLM

    dense = save_family("llama", tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    checkpoint = pruned_of(tmp_path / "dense", tmp_path / "pruned")
    found = recover(tmp_path / "dense", checkpoint, random_ids(8, 16), random_ids(2, 16), RECIPE)
    (tmp_path / "merged").mkdir()
    merge(checkpoint, found.adapter, tmp_path / "merged")
    names = sorted(file.name for file in checkpoint.iterdir() if file.name != DIGESTS_NAME)  # of other weights
    assert sorted(file.name for file in (tmp_path / "merged").iterdir()) == names
    assert sum(name.endswith(".safetensors") for name in names) > 1
    for name in names:
        same = (checkpoint / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
        assert same or name.endswith(".safetensors"), name
    weights = WeightFiles(tmp_path / "merged")
    assert {weights.dtype(name) for name in weights} == {"BF16"}
    assert load_model(tmp_path / "merged").config.model_type == "nirvana_llama"


def test_an_encoder_decoder_learns_to_predict_its_target(tmp_path):
    name = "t5-relu-tied"
    dense = save_family(name, tmp_path / "dense")
    checkpoint = pruned_of(dense, tmp_path / "pruned")
    ids = ids_for(name, 4, 16)
    recipe = replace(RECIPE, tokens=64 * 20, learning_rate=0.02, distillation=0.0)
    found = recover(dense, checkpoint, ids, ids, recipe)
    with torch.no_grad():
        output = load_model(checkpoint)(input_ids=ids[0], decoder_input_ids=ids[1]).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(output.flatten(0, 1), ids[1][:, 1:].flatten())
    assert found.curve[0].heldout_loss == pytest.approx(float(nll), rel=1e-5)
    assert found.curve[-1].heldout_loss < found.curve[0].heldout_loss


def test_an_adapter_of_another_checkpoint_is_refused(dense, pruned, tmp_path):
    found = recover(dense, pruned, random_ids(8, 16), random_ids(2, 16), replace(RECIPE, tokens=64))
    (tmp_path / "merged").mkdir()
    with pytest.raises(InputError, match=r"adapter: expected matrices for model\.layers\.0\..*another checkpoint"):
        merge(dense, found.adapter, tmp_path / "merged")
    assert not list((tmp_path / "merged").iterdir())
    found.adapter.save(tmp_path / "adapter")
    (tmp_path / "adapter" / ADAPTER_NAME).write_bytes(b"nothing")
    with pytest.raises(InputError, match="expected an adapter, got a file that cannot be read"):
        Adapter.load(tmp_path / "adapter")


# -- bad input --------------------------------------------------------------------------------------------------------


def test_peft_that_is_not_there_is_told(dense, pruned, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"expected the package peft .*; run `pip install peft`, or set") as caught:
        recover(dense, pruned, random_ids(8, 16), random_ids(2, 16), RECIPE)
    assert "\n" not in str(caught.value)


def test_a_loss_that_explodes_is_told(dense, pruned):
    with pytest.raises(InputError, match=r"expected a finite loss, got (nan|inf).*lower recovery\.learning_rate"):
        recover(dense, pruned, random_ids(8, 16), random_ids(2, 16), replace(RECIPE, learning_rate=1e30))


def test_a_checkpoint_of_another_model_is_refused(pruned, tmp_path):
    from tiny import tiny_llama

    other = tiny_llama(tmp_path / "other", vocab_size=600)
    with pytest.raises(InputError, match=r"expected the vocabulary of the dense model \(600 tokens\), got 512"):
        recover(other, pruned, random_ids(8, 16), random_ids(2, 16), RECIPE)
