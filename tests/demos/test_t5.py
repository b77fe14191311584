"""The demonstration's training on the tiny corpus, and the whole of it with a recipe of seconds."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from tiny import tiny_corpus
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from demos import t5
from demos.t5_training import RECORD, Recipe, build_model, train_t5, unigram_loss

RECIPE = Recipe(
    vocabulary=512,
    hidden=32,
    heads=4,
    head_dim=8,
    neurons=64,
    layers=2,
    steps=150,
    batch=8,
    length=40,
    learning_rate=0.02,
    warmup=10,
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    files = sorted(tiny_corpus(tmp_path_factory.mktemp("texts")).iterdir())
    return [file.read_text() for file in files]


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained") / "model"
    train_t5(texts[:40], texts[40:], RECIPE, directory, {"corpus": "sha256:0"})
    return directory


def test_unigram_loss_by_hand():
    # 3 + 1, 1 + 1, 0 + 1 of 7 with one added to each count
    loss = unigram_loss(np.array([[0, 0], [0, 1]]), np.array([[0, 1, 2]]), vocabulary=3)
    assert loss == pytest.approx(-(math.log(4 / 7) + math.log(2 / 7) + math.log(1 / 7)) / 3)


def test_training_learns_more_than_frequencies(trained):
    record = json.loads((trained / RECORD).read_text())
    assert record["loss"] < record["loss_unigram"] - 0.2 < record["loss_uniform"]
    assert record["loss_uniform"] == math.log(512)
    assert abs(record["loss_other_source"] - record["loss"]) > 1e-4
    assert record["recipe"] == asdict(RECIPE)
    assert record["corpus"] == "sha256:0"
    assert record["tokens_read"] == 150 * 8 * 40


def test_the_model_loads_with_its_tokenizer(trained):
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    assert model.config.decoder_start_token_id == tokenizer.pad_token_id == 0
    ids = tokenizer("The river<extra_id_0> law")["input_ids"]
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") in ids
    assert ids[-1] == tokenizer.eos_token_id == model.config.eos_token_id
    assert len(tokenizer) <= model.config.vocab_size


def test_the_same_recipe_gives_the_same_model(texts, tmp_path):
    weights = []
    for name in ("one", "two"):
        train_t5(texts[:20], texts[20:30], replace(RECIPE, steps=3, warmup=1), tmp_path / name, {})
        weights.append(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_killed_training_leaves_nothing(texts, tmp_path, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("demos.t5_training._run", killed)
    with pytest.raises(KeyboardInterrupt):
        train_t5(texts[:5], texts[5:10], RECIPE, tmp_path / "model", {})
    assert not list(tmp_path.iterdir())


def test_the_demonstrated_model_has_three_to_five_million_parameters():
    assert 3e6 < sum(parameter.numel() for parameter in build_model(t5.RECIPE).parameters()) < 5e6


@pytest.mark.slow
def test_the_whole_demonstration(tmp_path, monkeypatch, capsys):
    """Training, then every step under its own parameters; a second run trains nothing."""
    tiny_corpus(tmp_path / "texts")
    monkeypatch.setattr(t5, "HOME", tmp_path / "home")
    monkeypatch.setitem(t5._CORPUS, "source", f"path:{tmp_path}/texts/*.txt")
    small = {
        "calibration": {"pool_size": 2, "sequences": 2, "sequence_length": 40, "heldout_length": 40},
        "evaluation": {"window": 40, "perplexity_tokens": 400, "cloze_items": 5},
        "benchmark": {"prompt_length": 8, "decode_tokens": 2, "repeats": 1, "warmup": 0},
    }
    for section, keys in small.items():
        monkeypatch.setitem(t5._PARAMS, section, t5._PARAMS[section] | keys)
    recipe = replace(RECIPE, steps=3, warmup=1)
    t5.main(recipe)
    out = capsys.readouterr().out
    assert "knowing how often each token occurs" in out
    assert "token perplexity" in out
    home = tmp_path / "home"
    summary = json.loads((home / "reports/evaluation.json").read_text())
    assert summary["token_perplexity_kind"] == "span_corruption"
    plan = json.loads((home / "artifacts/plan.json").read_text())
    assert plan["achieved_ratio"]["total"] == pytest.approx(0.4, abs=0.03)
    pruned = json.loads((home / "reports/benchmark.json").read_text())["ratio"]
    assert pruned["parameters"] < 1 and pruned["weight_bytes_per_token"] < 1
    before = (home / "model" / RECORD).stat().st_mtime_ns
    assert [result.state for result in t5._train_if_needed(recipe)] == ["Cached"]
    assert (home / "model" / RECORD).stat().st_mtime_ns == before
    assert [result.state for result in t5._train_if_needed(replace(recipe, seed=1))] == ["Completed"]
