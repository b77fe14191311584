"""Losses of tokens against a hand-computed case and naive cross entropy."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from nirvana.likelihood import token_losses


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
