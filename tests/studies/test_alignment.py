"""The roundings: kept counts are multiples, what is timed is the checkpoint, and nothing runs twice."""

import csv
import math
from dataclasses import replace

import numpy as np
import pytest
from sweeps import counted, made_row, tiny_comparison
from tiny import tiny_llama

from nirvana.errors import InputError
from studies.sweep import alignment
from studies.sweep.alignment import (
    Settings,
    cells_of,
    children,
    groups,
    measure,
    ratio_of_rounds,
    tables,
    verdict,
)
from studies.sweep.cells import UNREACHABLE, write_cells
from studies.sweep.pictures import draw_alignment

SETTINGS = Settings(round_to=(1, 32), ratios=(0.4,), prompt_length=8, decode_tokens=2, repeats=3, warmup=0)


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("alignment") / "model", intermediate_size=256)


@pytest.fixture
def comparison(model_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny_comparison(model_directory)


def counts_of(model):
    return [layer.mlp.gate_proj.out_features for layer in model.model.layers]


# --- measuring ------------------------------------------------------------------------------------------------


def test_what_is_timed_is_the_rounded_checkpoint(comparison, monkeypatch, tmp_path):
    seen, original = {}, alignment.measure_rounds

    def look(models, workload):
        seen.update({name: counts_of(model) for name, model in models.items()})
        return original(models, workload)

    monkeypatch.setattr(alignment, "measure_rounds", look)
    with counted(monkeypatch) as calls:
        rows = measure(comparison, SETTINGS)
    assert len(calls) == 3 and [row["round_to"] for row in rows] == [0, 1, 32]
    assert list(seen) == ["dense", "1", "32"]
    assert all(count == 256 for count in seen["dense"])
    assert all(count % 32 == 0 for count in seen["32"]) and any(count % 32 for count in seen["1"])
    keep, _ = comparison.keep("nirvana", 0.4, round_to=32)
    assert seen["32"] == [len(keep[s.name]) for s in comparison.stack.architecture.sites() if s.module == "mlp"]
    for row in rows[1:]:
        for phase in ("prefill", "decode"):
            of = row["latencies"][phase]
            assert len(of["dense"]) == len(of["pruned"]) == 3 and min(of["dense"] + of["pruned"]) > 0
    assert not [file for file in (tmp_path / ".cache/studies/alignment").iterdir() if file.is_dir()]

    seen.clear()
    again = tiny_comparison(comparison.model_directory)
    with counted(monkeypatch) as calls:
        assert measure(again, SETTINGS) == rows
    assert calls == [] and seen == {} and "stack" not in vars(again)  # nothing was opened
    measure(again, replace(SETTINGS, repeats=1))
    assert seen  # another workload is timed anew


def test_a_rounding_is_another_row(comparison):
    fine, coarse = (comparison.row("nirvana", 0.4, round_to=multiple) for multiple in (1, 32))
    assert fine["losses"] != coarse["losses"]
    assert comparison.row("nirvana", 0.4) == comparison.row("nirvana", 0.4, round_to=8)


def test_a_ratio_out_of_reach_is_not_timed(comparison, monkeypatch):
    monkeypatch.setattr(alignment, "measure_rounds", lambda *_: pytest.fail("timed"))
    rows = measure(comparison, replace(SETTINGS, ratios=(0.95,)))
    assert [UNREACHABLE in row for row in rows] == [False, True, True]
    assert verdict(cells_of(rows)) == ["Ratio 0.95: no rounding reaches it."]


def test_a_rounding_larger_than_a_layer_is_refused(comparison):
    with pytest.raises(InputError, match="round_to: expected 1 to 256"):
        measure(comparison, replace(SETTINGS, round_to=(512,)))


def test_models_that_do_not_fit_together_are_timed_each_with_the_dense_one(model_directory, monkeypatch):
    directories = dict.fromkeys(("dense", "1", "8"), model_directory)
    assert groups(directories) == [["dense", "1", "8"]]
    monkeypatch.setattr(alignment, "available_bytes", lambda device: 1)
    assert groups(directories) == [["dense", "1"], ["dense", "8"]]


def test_a_ratio_is_taken_round_by_round():
    """Both twice as slow in the second round: the ratio does not see it."""
    assert ratio_of_rounds([1.0, 2.0, 1.5], [2.0, 4.0, 2.0]) == {"ratio": 0.5, "low": 0.5, "high": 0.625}
    assert ratio_of_rounds(np.array([3.0]), [2.0]) == {"ratio": 1.5, "low": 1.5, "high": 1.5}


# --- what came out --------------------------------------------------------------------------------------------


def timed(pruned, dense=2.0):
    return {"latencies": {phase: {"dense": [dense] * 3, "pruned": [pruned] * 3} for phase in ("prefill", "decode")}}


ROWS = [
    made_row("dense", 0.0, 2.0, round_to=0),
    made_row("nirvana", 0.4, 3.0, round_to=1, **timed(1.5)),
    made_row("nirvana", 0.4, 3.5, round_to=64, **timed(1.0)),
    {"method": "nirvana", "ratio": 0.4, "round_to": 128, UNREACHABLE: "the nearest reachable ratio is 0.3"},
]


def test_what_came_out(tmp_path):
    cells = cells_of(ROWS)
    (sentence,) = verdict(cells)
    assert f"with round_to 1 perplexity is {math.exp(3):.2f}, prefill 0.75 and decode 0.75 of the dense" in sentence
    assert "64 is surely worse (+0.500 nats a token" in sentence and "prefill 0.50 and decode 0.50" in sentence
    quality, speed = tables(cells).values()
    assert [row[0] for row in quality] == ["round_to", "1", "64", "128"]
    assert quality[1][2] == "the reference" and quality[3][2] == "unreachable"
    assert [row[0] for row in speed] == ["round_to", "1", "64"] and speed[2][2] == "0.50 [0.50, 0.50]"
    found = {each.metric: each.points for each in children(cells)["ratio 0.4"]}
    assert found["prefill_ratio_by_round_to"] == [(1, 0.75), (64, 0.5)]
    with write_cells(cells, tmp_path / "alignment.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["decode_ms"] for row in rows] == ["1.5", "1.0", ""]
    png, svg = draw_alignment(cells, math.exp(2), tmp_path / "alignment.png")
    assert png.stat().st_size > 20_000
    assert all(word in svg.read_text() for word in ("Prefill latency", "Decode latency", "ratio 0.4", "dense"))
