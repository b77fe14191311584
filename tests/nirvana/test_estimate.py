"""Estimates: sizes counted by hand, what `auto` takes, and that the formulas grow with what they should grow with."""

from dataclasses import replace

import pytest
import torch
from tiny import all_families, family_configs, model_type_of, random_ids, save_family
from transformers import LlamaConfig

from nirvana.adapter import attach
from nirvana.architectures.registry import describe
from nirvana.errors import InputError
from nirvana.estimate import steps as estimate
from nirvana.estimate.memory import (
    ADAPTER_COPIES,
    BASE_BYTES,
    SCORING_ARENA_BYTES,
    compensation_bytes,
    divergence_bytes,
    fisher_bytes,
    recovery_bytes,
    saliency_bytes,
    self_generation_bytes,
)
from nirvana.estimate.steps import ModelSizes, Workload, choose
from nirvana.loading import load_model
from nirvana.walk import SEQUENCES_AT_ONCE


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
    sizes = ModelSizes.of(eight_billion)
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert sizes.largest_layer == layer
    assert sizes.block_weights == sizes.active_weights == 32 * layer
    assert sizes.weights == 32 * layer + 2 * 4096 * 128256 + 4096
    assert (sizes.largest_layer_tensor, sizes.largest_tensor) == (4096 * 14336, 4096 * 128256)
    assert (sizes.stored_bytes, sizes.streams, sizes.neurons, sizes.projection_columns) == (2, 1, 14336, 14336)
    # q, k, v, o; gate, up, down
    assert sizes.adapter_dimensions == 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert sizes.kv_width == 32 * 2 * 8 * 128  # layers, keys and values, KV heads, head dimension


def test_only_the_experts_that_a_token_meets_cost_time(tmp_path):
    save_family("qwen3_moe", tmp_path)
    sizes = ModelSizes.of(tmp_path)
    # two of three layers have 4 experts of 3 x 24 x 32 weights, of which a token meets 2
    assert sizes.block_weights - sizes.active_weights == 2 * 2 * 3 * 24 * 32


@pytest.mark.parametrize("name", all_families())
def test_every_family_has_an_estimate(name, tmp_path):
    save_family(name, tmp_path)
    steps = estimate.estimate(tmp_path, operations_per_second=1e9)
    assert {each.step for each in steps} == {"collect_gradients", "score_pool", "prune", "evaluate", "benchmark"}
    assert all(each.peak_bytes > 0 and 0 < each.seconds[0] < each.seconds[1] for each in steps)


def by_step(directory, **work):
    found = {}
    for each in estimate.estimate(directory, Workload(**work), operations_per_second=1e9):
        found.setdefault(each.step, []).append(each)
    return found


def test_what_is_asked_for_has_rows(eight_billion):
    plain = by_step(eight_billion)
    assert [each.memory for each in plain["collect_gradients"]] == ["fast", "lean", "lean"]
    assert not plain.keys() & {"generate_text", "compensate", "recover"}
    asked = {"compensation_sequences": 160, "self_generated": 120, "recovery_tokens": 8192}
    best = by_step(eight_billion, needs="input_gradients", **asked)
    # in the order in which they run
    expected = ["collect_gradients", "score_pool", "compensate", "prune", "recover", "evaluate", "benchmark"]
    assert list(best) == ["generate_text", *expected]
    assert [each.execution for each in best["generate_text"]] == ["resident"]
    assert [each.execution for each in best["collect_gradients"]] == ["resident", "streamed"]
    assert [each.execution for each in best["compensate"]] == ["resident", "streamed"]
    assert [each.execution for each in best["recover"]] == ["resident"]


@pytest.mark.parametrize("name", all_families())
def test_every_family_has_the_rows_that_can_be_asked_for(name, tmp_path):
    save_family(name, tmp_path)
    found = by_step(tmp_path, needs="input_gradients", compensation_sequences=4, self_generated=2, recovery_tokens=64)
    assert all(each.peak_bytes > 0 for step in found.values() for each in step)
    assert ("generate_text" in found) == (model_type_of(name) != "t5")  # which writes none
    sizes = ModelSizes.of(tmp_path)
    assert sizes.adapter_dimensions > 0 < sizes.projection_columns


def test_an_adapter_has_so_many_weights_a_rank(tmp_path):
    """Against peft's own adapters."""
    save_family("llama", tmp_path)
    model = attach(load_model(tmp_path), describe(tmp_path), rank=3, alpha=6, seed=0)
    assert (
        sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * ModelSizes.of(tmp_path).adapter_dimensions
    )


def test_fisher_keeps_what_enters_each_layer_and_no_gradient_of_a_weight(eight_billion):
    sizes, state = ModelSizes.of(eight_billion), 4 * 4096 * 128
    few, many = Workload(sequences=2), Workload(sequences=10)
    ways = [fisher_bytes(sizes, many, way) - fisher_bytes(sizes, few, way) for way in ("resident", "streamed")]
    assert ways == 2 * [(32 + 1 + 2) * 8 * state]  # layers, the output, two draws; 8 more sequences
    assert fisher_bytes(sizes, many, "streamed") < saliency_bytes(sizes, many, "streamed", "lean")
    more = replace(many, draws=5)
    assert fisher_bytes(sizes, more, "streamed") - fisher_bytes(sizes, many, "streamed") == 3 * 10 * state


def test_compensation_holds_states_of_all_tokens_and_a_gram_matrix(eight_billion):
    sizes, few, many = (
        ModelSizes.of(eight_billion),
        Workload(compensation_sequences=16),
        Workload(compensation_sequences=24),
    )
    grown = compensation_bytes(sizes, many, "streamed") - compensation_bytes(sizes, few, "streamed")
    assert grown == 4 * (8 * 4096 + 14336) * 8 * 128
    # a wider MLP makes the Gram matrix the largest part: 8 bytes, the matrix and its factors
    wide = replace(sizes, projection_columns=10 * 14336)
    one = Workload(compensation_sequences=1)
    gram = 16 * ((10 * 14336) ** 2 - 14336**2)
    assert compensation_bytes(wide, one, "streamed") - compensation_bytes(sizes, one, "streamed") > gram


def test_compensation_counts_the_text_that_the_model_writes(eight_billion):
    sizes = ModelSizes.of(eight_billion)
    both, as_many = Workload(compensation_sequences=16, self_generated=8), Workload(compensation_sequences=24)
    assert compensation_bytes(sizes, both, "streamed") == compensation_bytes(sizes, as_many, "streamed")
    written, given = ({"compensation_sequences": 16, "self_generated": 8}, {"compensation_sequences": 24})
    assert by_step(eight_billion, **written)["compensate"] == by_step(eight_billion, **given)["compensate"]
    # an encoder-decoder writes none
    two, alone = replace(sizes, streams=2), replace(both, self_generated=0)
    assert compensation_bytes(two, both, "streamed") == compensation_bytes(two, alone, "streamed")


def test_writing_holds_the_whole_model_keys_and_values_and_logits(eight_billion):
    sizes, work = ModelSizes.of(eight_billion), Workload(self_generated=120, compensation_length=64)
    cache, logits = 4 * 65536 * 120 * 64, 4 * 4 * 120 * 128256
    held = BASE_BYTES + SCORING_ARENA_BYTES + cache + logits
    assert self_generation_bytes(sizes, work) == held + 4 * sizes.weights
    # float32 files are used as they lie on disk, but not by a GPU
    mapped = replace(sizes, stored_bytes=4)
    assert self_generation_bytes(mapped, work) == held
    assert self_generation_bytes(mapped, work, on_cpu=False) == held + 4 * sizes.weights
    # no more at once than share a forward
    full, more = (replace(work, self_generated=count) for count in (SEQUENCES_AT_ONCE, 300))
    assert self_generation_bytes(sizes, full) == self_generation_bytes(sizes, more)


def test_writing_reads_all_weights_for_every_token_of_a_batch(eight_billion):
    sizes = ModelSizes.of(eight_billion)
    for count, batches in ((120, 1), (300, 3)):
        (found,) = by_step(eight_billion, self_generated=count, compensation_length=64)["generate_text"]
        operations = count * 64 * 2 * (sizes.block_weights + 4096 * 128256)
        shortest = operations / 1e9 + batches * 64 * 4 * sizes.weights / estimate.READ_BYTES_PER_SECOND
        assert found.seconds[0] == pytest.approx(estimate.START_SECONDS / 2 + shortest)


@pytest.mark.parametrize("name", family_configs())
def test_keys_and_values_are_as_wide_as_the_cache(name, tmp_path):
    """Against transformers' own cache."""
    save_family(name, tmp_path)
    layers = load_model(tmp_path)(random_ids(2, 3), use_cache=True).past_key_values.layers
    assert (
        sum(layer.keys.numel() + layer.values.numel() for layer in layers) == 2 * 3 * ModelSizes.of(tmp_path).kv_width
    )


def test_recovery_has_both_models_in_memory_only_where_one_teaches(eight_billion):
    sizes = ModelSizes.of(eight_billion)
    teaching = Workload(recovery_tokens=1024, pruning_ratio=0.5)
    alone = replace(teaching, distillation=0.0)
    pruned = sizes.weights - sizes.block_weights // 2
    assert recovery_bytes(sizes, teaching) - recovery_bytes(sizes, alone) == 4 * pruned  # dense alone, first
    rank = replace(teaching, recovery_rank=17)
    assert (
        recovery_bytes(sizes, rank) - recovery_bytes(sizes, teaching) == 4 * ADAPTER_COPIES * sizes.adapter_dimensions
    )
    # float32 files are used as they lie on disk
    mapped = replace(sizes, stored_bytes=4)
    assert recovery_bytes(mapped, teaching) == recovery_bytes(mapped, alone)
    assert recovery_bytes(sizes, teaching) - recovery_bytes(mapped, teaching) == 4 * (sizes.weights + pruned)


@pytest.mark.parametrize(
    ("step", "more"),
    [
        ("generate_text", {"self_generated": 240}),
        ("generate_text", {"compensation_length": 256}),
        ("collect_gradients", {"draws": 5}),
        ("compensate", {"compensation_length": 256}),
        ("compensate", {"self_generated": 240}),
        ("recover", {"recovery_tokens": 16384}),
        ("recover", {"recovery_curve_every": 1024}),
    ],
)
def test_more_of_it_takes_longer(step, more, eight_billion):
    asked = {"needs": "input_gradients", "compensation_sequences": 160, "self_generated": 120, "recovery_tokens": 8192}
    shorter, longer = (by_step(eight_billion, **work)[step][0].seconds for work in (asked, asked | more))
    assert shorter < longer


def test_streamed_holds_two_layers_where_resident_holds_all(eight_billion):
    sizes, work = ModelSizes.of(eight_billion), Workload(sequences=2)
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
    sizes = ModelSizes.of(eight_billion)
    few, many = Workload(sequences=2), Workload(sequences=32)
    assert saliency_bytes(sizes, few, "streamed", "lean") < saliency_bytes(sizes, many, "streamed", "lean")
    assert saliency_bytes(sizes, many, "resident", "lean") < saliency_bytes(sizes, many, "resident", "fast")


@pytest.mark.parametrize(
    ("free_gb", "expected"),
    [(200, ("resident", "fast")), (51, ("resident", "lean")), (8, ("streamed", "lean")), (1, ("streamed", "lean"))],
)
def test_auto_takes_the_fastest_way_that_fits(free_gb, expected, eight_billion, monkeypatch):
    monkeypatch.setattr(estimate, "available_bytes", lambda device: free_gb * 10**9)
    assert choose(eight_billion, Workload(), torch.device("cpu"), "auto", "auto") == expected


def test_auto_streams_fisher_where_its_own_peak_does_not_fit(eight_billion, monkeypatch):
    fisher, sizes = Workload(needs="input_gradients", sequences=2), ModelSizes.of(eight_billion)
    for share, expected in ((0.99, "streamed"), (1.01, "resident")):
        free = int(share * fisher_bytes(sizes, fisher, "resident") / estimate.FITS)
        monkeypatch.setattr(estimate, "available_bytes", lambda device, free=free: free)
        assert choose(eight_billion, fisher, torch.device("cpu"), "auto", "auto")[0] == expected
    # the gradients of weights, which it does not have, would not have fitted
    assert (
        choose(eight_billion, replace(fisher, needs="weight_gradients"), torch.device("cpu"), "auto", "auto")[0]
        == "streamed"
    )


def test_auto_leaves_alone_what_is_asked_for(eight_billion, monkeypatch):
    monkeypatch.setattr(estimate, "available_bytes", lambda device: 200 * 10**9)
    assert choose(eight_billion, Workload(), torch.device("cpu"), "streamed", "auto") == ("streamed", "lean")
    assert choose(eight_billion, Workload(), torch.device("cpu"), "auto", "lean") == ("resident", "lean")
    monkeypatch.setattr(estimate, "available_bytes", lambda device: 10**9)
    assert choose(eight_billion, Workload(), torch.device("cpu"), "resident", "auto") == ("resident", "lean")


def test_unknown_model_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match=r"expected a model directory with config\.json, found none"):
        estimate.estimate(tmp_path)
