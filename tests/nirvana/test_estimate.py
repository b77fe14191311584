"""Estimates: sizes counted by hand, what `auto` takes, and that the formulas grow with what they should grow with."""

from dataclasses import replace

import pytest
import torch
from tiny import all_families, save_family
from transformers import LlamaConfig

from nirvana import estimate
from nirvana.errors import InputError
from nirvana.estimate import Sizes, Workload, choose, divergence_bytes, saliency_bytes


@pytest.fixture
def eight_billion(tmp_path):
    """A configuration alone: the weights need not be there."""
    LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype="bfloat16",
        tie_word_embeddings=False,
    ).save_pretrained(tmp_path)
    return tmp_path


def test_sizes_by_hand(eight_billion):
    sizes = Sizes.of(eight_billion)
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert sizes.largest_layer == layer
    assert sizes.block_weights == sizes.active_weights == 32 * layer
    assert sizes.weights == 32 * layer + 2 * 4096 * 128256 + 4096
    assert (sizes.largest_layer_tensor, sizes.largest_tensor) == (4096 * 14336, 4096 * 128256)
    assert (sizes.stored_bytes, sizes.streams, sizes.neurons) == (2, 1, 14336)


def test_only_the_experts_that_a_token_meets_cost_time(tmp_path):
    save_family("qwen3_moe", tmp_path)
    sizes = Sizes.of(tmp_path)
    # two of three layers have 4 experts of 3 x 24 x 32 weights, of which a token meets 2
    assert sizes.block_weights - sizes.active_weights == 2 * 2 * 3 * 24 * 32


@pytest.mark.parametrize("name", all_families())
def test_every_family_has_an_estimate(name, tmp_path):
    save_family(name, tmp_path)
    steps = estimate.estimate(tmp_path, operations_per_second=1e9)
    assert {each.step for each in steps} == {"collect_gradients", "score_pool", "prune", "evaluate", "benchmark"}
    assert all(each.peak_bytes > 0 and 0 < each.seconds[0] < each.seconds[1] for each in steps)


def test_streamed_holds_two_layers_where_resident_holds_all(eight_billion):
    sizes, work = Sizes.of(eight_billion), Workload(sequences=2)
    resident, streamed = (saliency_bytes(sizes, work, way, "lean") for way in ("resident", "streamed"))
    assert resident - streamed == 4 * 30 * sizes.largest_layer
    # beside its dense layer the resident walk holds the sliced one, the streamed walk one tensor of it
    resident, streamed = (divergence_bytes(sizes, work, way) for way in ("resident", "streamed"))
    sliced = int(4 * sizes.largest_layer * 0.8) - 4 * sizes.largest_layer_tensor
    assert resident - streamed == 4 * 30 * sizes.largest_layer + sliced
    # float32 files are used as they lie on disk
    mapped = replace(sizes, stored_bytes=4)
    assert saliency_bytes(mapped, work, "resident", "lean") == saliency_bytes(mapped, work, "streamed", "lean")


def test_more_tokens_take_more_and_fast_takes_more_than_lean(eight_billion):
    sizes = Sizes.of(eight_billion)
    few, many = Workload(sequences=2), Workload(sequences=32)
    assert saliency_bytes(sizes, few, "streamed", "lean") < saliency_bytes(sizes, many, "streamed", "lean")
    assert saliency_bytes(sizes, many, "resident", "lean") < saliency_bytes(sizes, many, "resident", "fast")


@pytest.mark.parametrize(
    ("free_gb", "expected"),
    [(200, ("resident", "fast")), (51, ("resident", "lean")), (8, ("streamed", "lean")), (1, ("streamed", "lean"))],
)
def test_auto_takes_the_fastest_way_that_fits(free_gb, expected, eight_billion, monkeypatch):
    monkeypatch.setattr(estimate, "available_bytes", lambda: free_gb * 10**9)
    assert choose(eight_billion, Workload(), torch.device("cpu"), "auto", "auto") == expected


def test_auto_leaves_alone_what_is_asked_for(eight_billion, monkeypatch):
    monkeypatch.setattr(estimate, "available_bytes", lambda: 200 * 10**9)
    assert choose(eight_billion, Workload(), torch.device("cpu"), "streamed", "auto") == ("streamed", "lean")
    assert choose(eight_billion, Workload(), torch.device("cpu"), "auto", "lean") == ("resident", "lean")
    monkeypatch.setattr(estimate, "available_bytes", lambda: 10**9)
    assert choose(eight_billion, Workload(), torch.device("cpu"), "resident", "auto") == ("resident", "lean")


def test_unknown_model_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match=r"expected a model directory with config\.json, found none"):
        estimate.estimate(tmp_path)
