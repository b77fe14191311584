"""The factor of a KV group: a larger one keeps more groups, and what keeps the same units is judged once."""

import math

import pytest
from sweeps import counted, made_row, tiny_comparison
from tiny import tiny_llama

from studies.sweep.attention_factor import DEFAULT, Settings, cells_of, children, chosen, measure, tables, verdict
from studies.sweep.cells import UNREACHABLE
from studies.sweep.pictures import draw_attention_factor


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 256, "num_hidden_layers": 3}
    return tiny_llama(tmp_path_factory.mktemp("factor") / "model", **shape)


@pytest.fixture
def comparison(model_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny_comparison(model_directory)


def test_a_larger_factor_keeps_more_groups_and_all_meet_the_ratio(comparison, monkeypatch):
    with counted(monkeypatch) as calls:
        dense, *rows = measure(comparison, Settings((0.01, 100.0, 1000.0), (0.3,)))
    assert dense["method"] == "dense" and [row["factor"] for row in rows] == [0.01, DEFAULT, 100.0, 1000.0]
    kept = [row["kept"] for row in rows]
    assert kept == sorted(kept) and kept[0] < kept[-1] == rows[0]["groups"] == 12
    assert all(row["achieved_ratio"] == pytest.approx(0.3, abs=0.025) for row in rows)
    # 100 and 1000 keep every group, and so the same neurons: one model, judged once
    assert rows[2]["losses"] == rows[3]["losses"]
    assert len(calls) == 1 + len({str(row["losses"]) for row in rows})
    # what is judged is mask Fisher with least squares at that factor
    again = tiny_comparison(comparison.model_directory)
    assert rows[1]["losses"] == again.row("fisher", 0.3, "least_squares")["losses"]
    with counted(monkeypatch) as calls:
        assert measure(again, Settings((0.01, 100.0, 1000.0), (0.3,))) == [dense, *rows]
    assert calls == []


def test_a_ratio_out_of_reach_is_said(comparison):
    _, *rows = measure(comparison, Settings((1.0,), (0.98,)))
    assert all("cannot be reached" in row[UNREACHABLE] for row in rows)
    (sentence,) = verdict(cells_of(rows))
    assert sentence.startswith("Ratio 0.98: no factor reaches it")


# --- what came out --------------------------------------------------------------------------------------------


GROUPS = {"groups": 12}
ROWS = [
    made_row("dense", 0.0, 2.0, factor=None),
    made_row("fisher", 0.4, 3.0, kl=0.6, factor=0.5, kept=8, **GROUPS),
    made_row("fisher", 0.4, 3.5, kl=0.7, factor=1.0, kept=10, **GROUPS),
    made_row("fisher", 0.4, 3.25, kl=0.7, factor=2.0, kept=11, **GROUPS),
    made_row("fisher", 0.2, 2.5, kl=0.3, factor=1.0, kept=12, **GROUPS),
    made_row("fisher", 0.2, 2.5, kl=0.3, factor=2.0, kept=12, **GROUPS),
]


def test_kl_chooses_and_of_equals_the_default():
    cells = cells_of(ROWS)
    assert chosen(cells, 0.4).names["factor"] == 0.5 and chosen(cells, 0.2).names["factor"] == DEFAULT
    second, first = verdict(cells)
    assert first.startswith(
        f"Ratio 0.4: held-out KL chooses attention_factor 0.5 (KL 0.600, perplexity {math.exp(3):.2f}"
    )
    assert "8 of 12 KV groups" in first and "surely better (-0.250 nats" in first
    assert second.startswith("Ratio 0.2: held-out KL chooses attention_factor 2 ") and second.endswith("the default.")


def test_table_and_series():
    cells = cells_of(ROWS)
    table = tables(cells)["Ratio 0.4; differences to factor 2 with 95 % intervals"]
    assert [row[:2] for row in table] == [
        ["factor", "KV groups"],
        ["0.5", "8 of 12"],
        ["1", "10 of 12"],
        ["2", "11 of 12"],
    ]
    assert table[3][3] == "the reference" and table[1][5].startswith("-0.250")
    by_name = {each.metric: each.points for each in children(cells)["ratio 0.4"]}
    assert by_name["kept_by_factor_percent"] == [(50, 8.0), (100, 10.0), (200, 11.0)]


def test_picture(tmp_path):
    png, svg = draw_attention_factor(cells_of(ROWS), math.exp(2), tmp_path / "attention_factor.png")
    assert png.stat().st_size > 20_000
    assert all(word in svg.read_text() for word in ("Held-out KL", "ratio 0.4", "ratio 0.2", "default", "dense"))
