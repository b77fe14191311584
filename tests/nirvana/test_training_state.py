"""A killed training run goes on from its own numbers, or starts over: never from damaged ones."""

import torch
from torch import nn

from nirvana.training_state import load_state, save_state


def trained(seed):
    torch.manual_seed(seed)
    parameters = {"a": nn.Parameter(torch.randn(3, 4)), "b": nn.Parameter(torch.randn(2))}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    sum((p * p).sum() for p in parameters.values()).backward()
    optimizer.step()
    return parameters, optimizer


def test_what_was_saved_comes_back(tmp_path):
    parameters, optimizer = trained(0)
    save_state(tmp_path / "state", parameters, optimizer, {"step": 1, "losses": [0.5]})
    others, other_optimizer = trained(1)
    assert load_state(tmp_path / "state", others, other_optimizer) == {"step": 1, "losses": [0.5]}
    for name in parameters:
        assert torch.equal(parameters[name], others[name])
        ours, theirs = optimizer.state[parameters[name]], other_optimizer.state[others[name]]
        assert all(torch.equal(ours[key], theirs[key]) for key in ("exp_avg", "exp_avg_sq", "step"))


def test_no_flipped_bit_is_believed(tmp_path):
    """Of the header and of the numbers: each either starts over or changes nothing that is read."""
    parameters, optimizer = trained(0)
    file = tmp_path / "state"
    save_state(file, parameters, optimizer, {"step": 1, "losses": [0.5]})
    whole = file.read_bytes()
    untouched, other_optimizer = trained(1)
    before = {name: p.detach().clone() for name, p in untouched.items()}
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        found = load_state(file, untouched, other_optimizer)
        if found is not None:  # a key that nobody reads, such as a blank of the header
            assert found == {"step": 1, "losses": [0.5]}
            assert all(torch.equal(parameters[name], untouched[name]) for name in parameters)
            untouched, other_optimizer = trained(1)
        else:
            assert all(torch.equal(before[name], untouched[name]) for name in before)
