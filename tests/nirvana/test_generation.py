"""Text that a model writes: its own distribution, the same draws each time, one forward a token."""

import numpy as np
import pytest
import torch
from tiny import tiny_llama

from nirvana import generation
from nirvana.errors import InputError
from nirvana.generation import generate
from nirvana.loading import load_model

TOKENS = range(2, 512)
"""All but BOS and EOS."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(tiny_llama(tmp_path_factory.mktemp("model")))


def test_each_sequence_has_its_length_and_allowed_tokens_only(model):
    allowed = {7, 11, 300}
    found = generate(model, 20, 6, allowed)
    assert found.shape == (20, 6) and found.dtype == torch.int64
    assert set(found.flatten().tolist()) == allowed
    assert generate(model, 3, 1, [5]).tolist() == [[5], [5], [5]]


def test_the_seed_decides_the_text(model):
    first, again, other = (generate(model, 4, 12, TOKENS, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(generate(model, 4, 12, TOKENS[::-1]), first)  # whatever order the tokens are given in


def recomputed(model, sequences, length, allowed, seed=0):
    """Write without a cache, a sequence at a time: at each token a forward over all that is written."""
    found = []
    for row in range(sequences):
        draws = np.random.default_rng((seed, row)).random(length)
        ids = [int(allowed[int(draws[0] * len(allowed))])]
        for draw in draws[1:]:
            with torch.no_grad():
                probabilities = model(torch.tensor([ids]), use_cache=False).logits[0, -1].double().softmax(-1)[allowed]
            shares = (probabilities / probabilities.sum()).cumsum(0).numpy()
            ids.append(int(allowed[np.flatnonzero(shares > draw)[0]]))
        found.append(ids)
    return torch.tensor(found)


def test_it_is_what_recomputing_every_prefix_draws(model):
    allowed = torch.arange(2, 512, 3)
    assert torch.equal(generate(model, 5, 16, allowed.tolist(), seed=3), recomputed(model, 5, 16, allowed, seed=3))


def test_a_token_is_drawn_from_the_models_own_distribution(model):
    """Temperature 1: what follows a token follows it as often as the model says."""
    allowed = torch.tensor([2, 40, 100, 300])
    found = generate(model, 4000, 2, allowed.tolist())
    with torch.no_grad():
        expected = model(allowed[:, None]).logits[:, -1, allowed].softmax(-1)
    for first, probabilities in zip(allowed, expected, strict=True):
        following = found[found[:, 0] == first, 1]
        assert 900 < len(following) < 1100  # the first one is drawn evenly
        shares = torch.stack([(following == token).float().mean() for token in allowed])
        errors = (probabilities * (1 - probabilities) / len(following)).sqrt()
        assert ((shares - probabilities).abs() < 4 * errors + 1e-6).all()


def test_more_sequences_begin_with_the_same_ones(model):
    assert torch.equal(generate(model, 6, 10, TOKENS)[:4], generate(model, 4, 10, TOKENS))


def test_bos_comes_first_and_counts(model):
    told = []
    found = generate(model, 5, 8, TOKENS, bos=0, on_token=told.append)
    assert found.shape == (5, 8) and sum(told) == found.numel()
    assert (found[:, 0] == 0).all() and (found[:, 1:] > 1).all()
    # what is written depends on it: the same draws without it are another text
    assert not torch.equal(found[:, 1:], generate(model, 5, 7, TOKENS))
    with torch.no_grad():
        logits = model(found[:, :2]).logits[:, -1, 2:].double().softmax(-1).cumsum(-1)
    draws = [np.random.default_rng((0, row)).random(8)[2] for row in range(5)]
    assert found[:, 2].tolist() == [2 + int((row <= draw).sum()) for row, draw in zip(logits, draws, strict=True)]
    assert generate(model, 2, 1, TOKENS, bos=0).tolist() == [[0], [0]]


def test_more_sequences_than_share_a_forward(model, monkeypatch):
    shapes, told = [], []
    hook = model.register_forward_pre_hook(
        lambda module, given, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    monkeypatch.setattr(generation, "SEQUENCES_AT_ONCE", 3)
    try:
        found = generate(model, 7, 4, TOKENS, on_token=told.append)
    finally:
        hook.remove()
    # batches of 3, 3 and 1, a token a forward, none after the last
    assert shapes == 3 * [(3, 1)] + 3 * [(3, 1)] + 3 * [(1, 1)]
    assert told == 4 * [3] + 4 * [3] + 4 * [1] and sum(told) == found.numel()
    assert len({tuple(row) for row in found.tolist()}) == 7  # no batch repeats another's draws
    assert torch.equal(generate(model, 3, 4, TOKENS), found[:3])


def test_no_sequences(model):
    assert generate(model, 0, 9, TOKENS).shape == (0, 9)


def test_nothing_to_write_is_one_clear_line(model):
    with pytest.raises(InputError, match="expected tokens that may be written, got none; check the tokenizer"):
        generate(model, 2, 4, [])


def test_broken_weights_are_one_clear_line(tmp_path):
    broken = load_model(tiny_llama(tmp_path))
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(InputError, match="expected finite logits, got others; check the model's weights"):
        generate(broken, 2, 4, TOKENS)
