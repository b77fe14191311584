"""What the head does in chunks, against hand-computed cases and whole logits."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from nirvana.head import head_divergence, head_logits, head_maxima, likeliest_tokens, token_losses


def test_loss_by_hand():
    """Logits of one position are (ln 1, ln 2, ln 5): P = 1/8, 2/8, 5/8."""
    head = torch.log(torch.tensor([[1.0], [2.0], [5.0]]))
    losses = token_losses(torch.ones(2, 1), torch.tensor([1, 2]), head)
    assert losses.tolist() == pytest.approx([math.log(4), math.log(8 / 5)], rel=1e-6)


@pytest.mark.parametrize("vocab", [1, 4095, 4097, 9000])
def test_chunks_of_the_vocabulary_do_not_show(vocab):
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(rows, 16, generator=generator) for rows in (131, vocab))
    targets = torch.randint(0, vocab, (131,), generator=generator)
    expected = cross_entropy((hidden @ head.T).double(), targets, reduction="none")
    torch.testing.assert_close(token_losses(hidden, targets, head), expected, rtol=1e-5, atol=1e-5)


def test_likeliest_tokens_and_logits_are_those_of_the_whole_head(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(7, 4, generator=generator), torch.randn(37, 4, generator=generator)
    whole = 3 * torch.tanh(hidden @ head.T / 3)
    for chunk in (1, 10, 37, 100):
        monkeypatch.setattr("nirvana.head.VOCAB_CHUNK", chunk)
        monkeypatch.setattr("nirvana.head.WHOLE_CHUNK", chunk)
        torch.testing.assert_close(head_logits(hidden, head, 3.0), whole)
        assert torch.equal(likeliest_tokens(hidden, head), whole.argmax(dim=1))


def test_objective_head_by_hand():
    """One sequence, two positions, three vocabulary entries."""
    head = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    hidden = torch.tensor([[[1.0, 0.0], [0.0, 3.0]]])
    # logits: position 0 -> (1, 0, 1), position 1 -> (0, 3, 3); maxima 1, 3, 3 at positions 0, 1, 1
    value, gradient = head_maxima(hidden, head, vocab_chunk=2)
    assert value == 7.0
    assert gradient.tolist() == [[[1.0, 0.0], [1.0, 2.0]]]


def test_ties_go_to_one_position():
    _, gradient = head_maxima(torch.ones(1, 4, 2), torch.ones(1, 2))
    assert sorted(gradient.sum(dim=2).flatten().tolist()) == [0.0, 0.0, 0.0, 2.0]


def test_head_divergence_by_hand():
    """Logits (ln 3, 0) against (0, 0): P = (3/4, 1/4), Q = (1/2, 1/2), KL = 3/4·ln(3/2) + 1/4·ln(1/2)."""
    head = torch.tensor([[1.0], [0.0]])
    value = head_divergence(torch.tensor([[3.0]]).log(), torch.zeros(1, 1), head)
    assert value == pytest.approx(0.75 * torch.tensor(1.5).log().item() - 0.25 * torch.tensor(2.0).log().item())


def test_chunks_do_not_matter(monkeypatch):
    """Large logits, chunks that do not divide the vocabulary: the running normalisers must rescale."""
    generator = torch.Generator().manual_seed(0)
    dense, pruned = (torch.randn(7, 4, generator=generator) * 20 for _ in range(2))
    head = torch.randn(101, 4, generator=generator)
    p, q = ((h.double() @ head.double().T).log_softmax(dim=-1) for h in (dense, pruned))
    expected = (p.exp() * (p - q)).sum(dim=-1).mean().item()
    for chunk in (3, 10, 101, 500):
        monkeypatch.setattr("nirvana.head.VOCAB_CHUNK", chunk)
        monkeypatch.setattr("nirvana.head.POSITION_CHUNK", 2)
        assert head_divergence(dense, pruned, head) == pytest.approx(expected, rel=1e-5)
