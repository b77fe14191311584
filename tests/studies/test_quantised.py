"""The quantisation study: rounding and bytes by hand, cells against models built by hand, nothing computed twice."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sweeps import pruned_model
from tiny import random_ids, save_family, tiny_llama
from torch import nn

from nirvana.compensation import compensate
from nirvana.errors import InputError
from nirvana.loading import load_model
from nirvana.walk import Stack, final_hidden_states
from studies import comparison as judging
from studies.comparison import Comparison, Text, Texts
from studies.lines import lines_of
from studies.measure import rows as rows_of
from studies.quantised import mark_front, sums, verdict
from studies.rounding import (
    PRECISIONS,
    STORED,
    Precision,
    block_matrices,
    quantised_bytes,
    quantised_hidden_states,
    round_trip,
    stored_bytes,
)
from studies.spec import load_spec
from studies.subject import Asked
from studies.variants import DENSE, Variant

RATIO = 0.4
INT8, INT4 = PRECISIONS["int8"], PRECISIONS["int4"]
SPEC = load_spec("quantised")
SETTINGS = {"ways": ["nirvana", "random+least_squares"], "ratios": [0.3, 0.5]}


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("quantised") / "model", intermediate_size=256)


def measure(comparison, values):
    return rows_of(SimpleNamespace(comparison=comparison, asked=Asked(), notes=[], parameters={}), SPEC, values)


def texts():
    return Texts(*(Text(random_ids(6, 16, seed)) for seed in range(4)))


@pytest.fixture
def quantised(model_directory, tmp_path, monkeypatch):
    """Its cache goes beside the test."""
    monkeypatch.chdir(tmp_path)
    return Comparison(model_directory, texts(), round_to=1)


# --- rounding -------------------------------------------------------------------------------------------------


def test_round_trip_by_hand():
    # steps of 1/8: what the largest of a row, 7 steps away, gets in 4 bits; the second row's are of 1/4
    weight = torch.tensor([[0.875, -0.3, 0.0624, 0.0626], [-1.75, 0.375, 0.125, 0.0]])
    whole_rows = Precision("", bits=4, group=None)
    # 0.375 and 0.125 are halfway: to the even step
    expected = torch.tensor([[0.875, -0.25, 0.0, 0.125], [-1.75, 0.5, 0.0, 0.0]])
    assert torch.equal(round_trip(weight, whole_rows), expected)


def test_groups_have_scales_of_their_own_and_the_last_may_be_short():
    weight = torch.tensor([[0.875, 0.1, 14.0, -3.0, 0.4375]])
    found = round_trip(weight, Precision("", bits=4, group=2))
    assert torch.equal(found, torch.tensor([[0.875, 0.125, 14.0, -4.0, 0.4375]]))


def test_scales_are_float16():
    found = round_trip(torch.tensor([[1.0]]), INT8)
    assert found.item() == 127 * float(np.float16(1 / 127)) != 1.0


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=lambda each: each.name)
def test_nothing_moves_by_more_than_half_a_step(precision):
    weight = torch.randn(3, 50, 130, generator=torch.Generator().manual_seed(0))
    found = round_trip(weight, precision)
    group = precision.group or 130
    for start in range(0, 130, group):
        part = weight[..., start : start + group]
        step = part.abs().amax(-1, keepdim=True) / (2 ** (precision.bits - 1) - 1)
        # a thousandth: the scale's own rounding, at the far end of the range
        away = (found[..., start : start + group] - part).abs()
        assert (away <= step * (0.5 + 127 * 2**-11)).all() and (away > 0.4 * step).any()
    assert found.shape == weight.shape


def test_nothing_stays_nothing():
    assert torch.equal(round_trip(torch.zeros(2, 70), INT4), torch.zeros(2, 70))
    assert torch.equal(round_trip(torch.full((1, 3), 1e-9), INT8), torch.zeros(1, 3))  # a scale below float16


def test_bytes_by_hand():
    assert quantised_bytes((10, 64), INT8) == 10 * (64 + 2)
    assert quantised_bytes((10, 64), INT4) == 10 * (32 + 2)
    assert quantised_bytes((10, 65), INT4) == 10 * (33 + 2 * 2)
    assert quantised_bytes((2, 10, 64), INT8) == 2 * 10 * (64 + 2)


def test_bytes_of_a_model(tmp_path):
    stack = Stack.open(tiny_llama(tmp_path))  # hidden 32, 64 neurons, 4 heads of 8 in 2 groups, 512 tokens, tied
    shapes = stack.architecture.parameter_shapes
    rows_of_32 = 32 + 16 + 16 + 32 + 64 + 64  # q, k, v, o, gate, up; down has 32 of 64
    rest = 512 * 32 + 2 * 2 * 32 + 32
    assert stored_bytes(stack, shapes, None) == 4 * (2 * (rows_of_32 * 32 + 32 * 64) + rest)
    assert stored_bytes(stack, shapes, INT8) == 2 * (rows_of_32 * 34 + 32 * 66) + 4 * rest
    assert stored_bytes(stack, shapes, INT4) == 2 * (rows_of_32 * 18 + 32 * 34) + 4 * rest


# --- cells ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def expected_cell(dense, model, given):
    """KL and losses by transformers alone."""
    ids = given.heldout.ids
    p, q = (each(ids).logits.double().log_softmax(-1) for each in (dense, model))
    ids = given.evaluation.ids
    logits = model(ids).logits[:, :-1].double()
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1)
    return {
        "kl_divergence": pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3, abs=1e-6),
        "losses": pytest.approx(losses.tolist(), rel=1e-5),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def rounded(model, precision):
    with torch.no_grad():
        for module in model.model.layers.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(round_trip(module.weight, precision))
    return model


@pytest.mark.parametrize("precision", [STORED, *PRECISIONS])
def test_a_cell_is_the_pruned_and_rounded_model(precision, quantised, model_directory, tmp_path):
    keep = quantised.keep(Variant("nirvana", RATIO))
    pruned_model(model_directory, keep, RATIO, tmp_path / "pruned")
    for name, ratio, directory in (("nirvana", RATIO, tmp_path / "pruned"), (DENSE, 0.0, model_directory)):
        found = quantised.row(Variant(name, ratio, precision=precision))
        model = load_model(directory)
        model = rounded(model, PRECISIONS[precision]) if precision != STORED else model
        expected = expected_cell(load_model(model_directory), model, quantised.texts)
        assert {key: found[key] for key in expected} == expected


def test_what_compensation_solved_for_is_rounded_too(quantised):
    keep = quantised.keep(Variant("random", RATIO))
    ids = quantised.texts.evaluation.ids
    updates = dict(compensate(quantised.stack, keep, quantised.texts.compensation.ids))
    matrices = block_matrices(quantised.stack.architecture.sites())
    twice = {name: round_trip(value, INT4) if name in matrices else value for name, value in updates.items()}
    found = [quantised_hidden_states(quantised.stack, keep, ids, each, INT4) for each in (updates, twice)]
    # nearly: a matrix that was rounded once has its largest weight where float16 puts it
    assert torch.allclose(*found, atol=0.02, rtol=0.02)
    plain = final_hidden_states(quantised.stack, ids, keep, updates)
    assert not torch.allclose(found[0], plain, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("family", ["phi3", "qwen3_moe", "gemma3_text"])
def test_other_layouts_are_rounded(family, tmp_path):
    stack = Stack.open(save_family(family, tmp_path))
    sites, ids = stack.architecture.sites(), random_ids(2, 8)
    keep = {site.name: np.arange(site.units) for site in sites}
    plain, coarse = final_hidden_states(stack, ids, keep), quantised_hidden_states(stack, keep, ids, {}, INT4)
    assert torch.isfinite(coarse).all() and not torch.allclose(plain, coarse, atol=1e-3)
    shapes = stack.architecture.parameter_shapes
    sizes = [stored_bytes(stack, shapes, each) for each in (None, INT8, INT4)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


# --- what is kept ---------------------------------------------------------------------------------------------


def test_a_killed_study_goes_on_and_a_second_run_computes_nothing(quantised, model_directory, monkeypatch):
    calls, solved, original = [], [], Comparison.judged_by

    def dies_at_the_fifth(self, hidden_of):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(1)
        return original(self, hidden_of)

    monkeypatch.setattr(Comparison, "judged_by", dies_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        measure(quantised, SETTINGS)
    calls.clear()
    monkeypatch.setattr(Comparison, "judged_by", lambda self, of: calls.append(1) or original(self, of))
    monkeypatch.setattr(judging, "compensate", lambda *given: solved.append(1) or compensate(*given))
    rows = measure(Comparison(model_directory, texts(), round_to=1), SETTINGS)
    assert len(rows) == 5 * 3 and len(calls) == 15 - 4
    assert len(solved) == 2  # once a model, not once a precision
    calls.clear()
    last = Comparison(model_directory, texts(), round_to=1)
    assert measure(last, SETTINGS) == rows and calls == []
    assert "stack" not in vars(last)  # nothing was opened


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("flop", "expected some of nirvana, fisher, .*, got 'flop'"),
        ("shortgpt", "got shortgpt, which removes none"),
        ("random+bias", "expected compensation none or least_squares beside a precision, got bias"),
    ],
)
def test_what_cannot_be_is_one_line(way, message, quantised):
    with pytest.raises(InputError, match=message) as raised:
        measure(quantised, {"ways": [way], "ratios": [RATIO]})
    assert "\n" not in str(raised.value)


# --- tables and picture ---------------------------------------------------------------------------------------


def made_row(method, ratio, precision, losses, size, compensation="none"):
    found = {"method": method, "ratio": ratio, "compensation": compensation, "precision": precision}
    found |= {"achieved_ratio": ratio, "parameters": 100, "bytes": size, "kl_divergence": 0.5}
    return found | {"losses": losses}


ROWS = [
    made_row(DENSE, 0.0, STORED, [1.0, 2.0], 400),
    made_row(DENSE, 0.0, "int8", [1.1, 2.1], 100),
    made_row("nirvana", 0.4, STORED, [2.0, 4.0], 300),
    made_row("nirvana", 0.4, "int8", [2.1, 4.1], 80),
    made_row("fisher", 0.4, STORED, [1.5, 2.5], 300, "least_squares"),
    made_row("fisher", 0.4, "int8", [1.8, 2.9], 80, "least_squares"),
]


def test_tables_by_hand():
    table = SPEC.tables[0]
    lines, found = mark_front(lines_of(ROWS, table), ROWS, {}), sums(ROWS, {})
    assert [line["token_perplexity"] for line in lines[:2]] == [pytest.approx(math.exp(each)) for each in (1.5, 1.6)]
    assert lines[1]["loss_increase"] == pytest.approx(0.1) and lines[0]["loss_increase"] == 0
    # dense int8 beats everything larger; of the two of 80 bytes the better one stays
    assert [line["on_front"] for line in lines] == [True, True, False, False, False, True]
    plain, ours = found
    assert (plain["of_pruning"], plain["of_quantising"]) == (pytest.approx(1.5), pytest.approx(0.1))
    assert (plain["added"], plain["together"]) == (pytest.approx(1.6), pytest.approx(1.6))
    assert plain["excess"] == pytest.approx(0) and plain["low"] <= plain["excess"] <= plain["high"]
    # windows: 0.3 − 0.1 and 0.4 − 0.1
    assert [ours[name] for name in ("excess", "low", "high")] == [pytest.approx(each) for each in (0.25, 0.2, 0.3)]
    first, front = verdict({"": lines, "sums": found}, ROWS, {})
    assert "+0.100 nats" in first and "in 1 of 2" in first and "mask Fisher + LS 0.4 (+0.250)" in first
    assert "dense 0 stored" in front and "NIRVANA" not in front
