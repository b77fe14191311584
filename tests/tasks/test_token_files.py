"""Token ids come back in the order that a walk takes them; anything else is one line."""

import pytest
import torch
from safetensors.torch import save_file

from nirvana.errors import InputError
from tasks.corpus.token_files import read_ids


def write(path, **shapes):
    save_file({name: torch.arange(torch.Size(shape).numel()).view(shape) for name, shape in shapes.items()}, path)
    return path


def test_one_stack_or_two(tmp_path):
    (ids,) = read_ids(write(tmp_path / "one", input_ids=(3, 4, 5)))
    assert torch.equal(ids, torch.arange(60).view(3, 4, 5))
    source, target = read_ids(write(tmp_path / "two", decoder_input_ids=(3, 4, 2), input_ids=(3, 4, 5)))
    assert (source.shape, target.shape) == ((3, 4, 5), (3, 4, 2))


@pytest.mark.parametrize(
    "shapes", [{"decoder_input_ids": (2, 3)}, {"input_ids": (2, 3), "decoder_input_ids": (3, 3)}, {"other": (2,)}]
)
def test_odd_contents_are_refused(tmp_path, shapes):
    with pytest.raises(InputError, match="expected input_ids, with decoder_input_ids alike or without"):
        read_ids(write(tmp_path / "odd", **shapes))


def test_unreadable_files_are_one_line(tmp_path):
    (tmp_path / "broken").write_bytes(b"no tensors")
    for name in ("broken", "missing"):
        with pytest.raises(InputError, match="cannot be read") as caught:
            read_ids(tmp_path / name)
        assert "\n" not in str(caught.value)
