"""Of two readings of a tokenizer the one counts with which the model was trained."""

import json
import random

import numpy as np
import pytest
import tokenizer_files as files
import torch
from exports import write_plan
from tiny import save_family, save_t5, tiny_sentence
from transformers import AutoModelForCausalLM, AutoTokenizer

from nirvana.checkpoint.reading import Losses, losses_of_own_text, settle, settled_tokenizer
from nirvana.checkpoint.tokenizer import TwoReadingsError, ids, read_tokenizer
from nirvana.surgery import prune

NUMBERS = "In 1984, 12345"


def two_readings(path):
    """Save a random Qwen2 whose tokenizer.json says otherwise than the class; return both readings."""
    save_family("qwen2", path)
    files.byte_level(path, "LlamaTokenizerFast")
    with pytest.raises(TwoReadingsError) as two:
        read_tokenizer(path)
    return two.value.readings


def train(path, tokenizer, steps=80):
    """Teach the model sentences with numbers in them, as a tokenizer cuts them."""
    generator = random.Random(0)
    text = [f"In {generator.randrange(3000)} {tiny_sentence(generator)}" for _ in range(300)]
    stream = torch.tensor([token for sentence in text for token in ids(tokenizer, sentence)])
    model = AutoModelForCausalLM.from_pretrained(path).train()
    optimiser = torch.optim.AdamW(model.parameters(), 4e-3)
    torch.manual_seed(0)
    for _ in range(steps):
        batch = torch.stack([stream[start : start + 48] for start in torch.randint(0, len(stream) - 48, (8,))])
        model(input_ids=batch, labels=batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval().save_pretrained(path)


@pytest.mark.parametrize("reading", ["file", "class"])
def test_the_reading_of_training_counts(reading, tmp_path, caplog):
    readings = two_readings(tmp_path / "dense")
    right = ids(readings[reading], NUMBERS)
    assert right != ids(readings["class" if reading == "file" else "file"], NUMBERS)
    train(tmp_path / "dense", readings[reading])
    assert ids(settled_tokenizer(tmp_path / "dense"), NUMBERS) == right
    assert "the model knows that of" in caplog.text
    prune(tmp_path / "dense", write_plan(tmp_path, {"layers.0.kv_group": np.arange(2)}), tmp_path / "pruned")
    assert ids(AutoTokenizer.from_pretrained(tmp_path / "pruned"), NUMBERS) == right
    settle(tmp_path / "dense")
    assert json.loads((tmp_path / "dense/tokenizer_config.json").read_text())["nirvana_reading"] == reading
    assert ids(read_tokenizer(tmp_path / "dense"), NUMBERS) == right


def test_a_model_that_does_not_tell_is_read_as_transformers_reads_it(tmp_path, caplog):
    two_readings(tmp_path / "dense")
    right = ids(AutoTokenizer.from_pretrained(tmp_path / "dense"), NUMBERS)
    prune(tmp_path / "dense", write_plan(tmp_path, {"layers.0.kv_group": np.arange(2)}), tmp_path / "pruned")
    assert "does not tell" in caplog.text
    assert ids(AutoTokenizer.from_pretrained(tmp_path / "pruned"), NUMBERS) == right


def test_an_encoder_decoder_is_not_asked(tmp_path):
    save_t5("t5-relu-tied", tmp_path)
    assert losses_of_own_text(tmp_path, {}) is None


def test_what_losses_say():
    assert Losses(1.0, 2.0, 0.3).reading == "file"
    assert Losses(2.0, 1.0, 0.3).reading == "class"
    assert Losses(1.0, 1.04, 0.3).reading is None, "too near"
    assert Losses(1.0, 2.0, 0.9).reading is None, "no better than a guess"
