"""The sweep of gamma: the choice is that of the least held-out KL, what is out of reach is said, nothing runs twice."""

import csv
import math
from dataclasses import replace

import pytest
from sweeps import counted, made_row, tiny_comparison
from tiny import tiny_llama

from nirvana.allocation import module_rates
from nirvana.errors import InputError
from nirvana.methods import Method
from studies.comparison import Comparison
from studies.methods import METHODS
from studies.sweep import gamma_sweep
from studies.sweep.cells import UNREACHABLE, judged, reference_of, unless_unreachable, write_cells
from studies.sweep.gamma_sweep import Settings, cells_of, children, chosen, is_capped, measure, tables, verdict
from studies.sweep.pictures import draw_gamma


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    """Eight KV groups in two layers: gamma decides how many of them leave."""
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 256}
    return tiny_llama(tmp_path_factory.mktemp("gamma") / "model", **shape)


@pytest.fixture
def comparison(model_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny_comparison(model_directory)


# --- measuring ------------------------------------------------------------------------------------------------


def test_every_gamma_and_the_joint_ranking_are_judged_once(comparison, monkeypatch):
    settings = Settings((0.5, 8.0), (0.4,))
    with counted(monkeypatch) as calls:
        rows = measure(comparison, settings)
    assert [(row["method"], row["gamma"]) for row in rows] == [
        ("dense", None),
        ("nirvana", 0.5),
        ("nirvana", 3.36),  # the published one always takes part
        ("nirvana", 8.0),
        ("fisher", None),
    ]
    assert len(calls) == 5
    low, high = (row["achieved_by_module"] for row in (rows[1], rows[3]))
    assert low["attention"] > high["attention"] and low["mlp"] < high["mlp"]
    again = tiny_comparison(comparison.model_directory)
    with counted(monkeypatch) as calls:
        assert measure(again, settings) == rows
    assert calls == [] and "stack" not in vars(again)  # nothing was opened


def test_rows_are_those_of_the_comparison(comparison, monkeypatch):
    published = comparison.row("nirvana", 0.4)
    with counted(monkeypatch) as calls:
        rows = measure(comparison, Settings((3.36,), (0.4,)))
    assert len(calls) == 2  # the dense model and Fisher's
    assert rows[1]["losses"] == published["losses"]
    other = comparison.row(replace(METHODS["nirvana"], gamma=0.5), 0.4)
    assert other["losses"] != published["losses"]


def test_a_method_under_anothers_name_is_refused(comparison):
    with pytest.raises(ValueError, match="expected the scorer of that name"):
        comparison.row(Method("nirvana", METHODS["random"].scorer, "modules"), 0.4)


def test_a_ratio_out_of_reach_is_said(comparison, tmp_path):
    rows = measure(comparison, Settings((2.0,), (0.2, 0.99)))
    lost = [row for row in rows if UNREACHABLE in row]
    assert [(row["ratio"], row["gamma"]) for row in lost] == [(0.99, 2.0), (0.99, 3.36), (0.99, None)]
    cells = cells_of(rows)
    first, second = verdict(cells)
    assert first.startswith("Ratio 0.2: held-out KL chooses gamma")
    assert second.startswith("Ratio 0.99: no gamma reaches it: pruning_ratio: 0.99 cannot be reached")
    assert all(row[2] == "unreachable" for row in list(tables(cells).values())[1][1:])
    png, _ = draw_gamma(cells, 100.0, tmp_path / "gamma.png")
    assert png.stat().st_size > 20_000
    with write_cells(cells, tmp_path / "gamma.csv").open() as file:
        written = list(csv.DictReader(file))
    assert len(written) == 6 and "at most" in written[3][UNREACHABLE] and written[3]["token_perplexity"] == ""


def test_what_is_wrong_otherwise_is_not_swallowed(comparison, monkeypatch):
    monkeypatch.setattr(Comparison, "judged_by", lambda *_: (_ for _ in ()).throw(InputError("expected finite losses")))
    with pytest.raises(InputError, match="expected finite losses"):
        measure(comparison, Settings((2.0,), (0.2,)))
    assert unless_unreachable({"a": 1}, lambda: {"b": 2}) == {"a": 1, "b": 2}


def test_capped_by_hand():
    """Attention 100 weights in 10 groups, MLP 300: at ratio 0.4 and gamma 0.5, p_attn = 0.4 · 400 / 250 = 0.64."""
    sizes = {"attention": {"weights": 100, "units": 10}, "mlp": {"weights": 300, "units": 100}}
    assert module_rates({"attention": 100, "mlp": 300}, None, 0.4, 0.5)["attention"] == pytest.approx(0.64)
    assert not is_capped(0.6, sizes, 0.4, 0.5)  # 6 of 10 groups: rounded down
    assert is_capped(0.5, sizes, 0.4, 0.5)


# --- what came out --------------------------------------------------------------------------------------------


ROWS = [
    made_row("dense", 0.0, 2.0, gamma=None),
    made_row("nirvana", 0.4, 3.5, kl=1.0, gamma=2.0, capped=True, achieved_by_module={"attention": 0.3, "mlp": 0.4}),
    made_row("nirvana", 0.4, 4.0, kl=1.5, gamma=3.36, achieved_by_module={"attention": 0.2, "mlp": 0.5}),
    made_row("nirvana", 0.4, 3.0, kl=1.2, gamma=5.0, achieved_by_module={"attention": 0.1, "mlp": 0.5}),
    made_row("fisher", 0.4, 2.5, kl=0.9, gamma=None, achieved_by_module={"attention": 0.1, "mlp": 0.5}),
]


def test_the_chosen_gamma_is_that_of_the_least_kl():
    cells = cells_of(ROWS)
    best = chosen(cells, 0.4)
    assert best.names["gamma"] == 2.0
    assert best.found.token_perplexity == pytest.approx(math.exp(3.5))
    # windows 3 and 4 against 3.5 and 4.5
    assert (best.found.loss_difference, best.found.loss_low, best.found.loss_high) == (-0.5, -0.5, -0.5)
    assert best.found.kl_interval() == pytest.approx((1.0, 1.0))
    assert best.found.perplexity_interval() == pytest.approx((math.exp(3.5), math.exp(3.5)))
    (sentence,) = verdict(cells)
    assert "chooses gamma 2 (KL 1.000" in sentence and "surely better (-0.500 nats a token" in sentence
    assert "gamma 5 has the least perplexity" in sentence
    assert f"KL 0.900 and perplexity {math.exp(2.5):.2f}" in sentence


def test_of_equals_the_nearest_to_the_published_is_chosen():
    rows = [made_row("nirvana", 0.4, 3.0, gamma=gamma) for gamma in (0.5, 3.36, 8.0)]
    assert chosen(cells_of(rows), 0.4).names["gamma"] == 3.36


def test_intervals_are_paired_and_move_with_the_reference():
    a, b = made_row("x", 0.4, 4.0), made_row("x", 0.4, 3.0)
    a["losses"], b["losses"] = [2.0, 6.0], [1.0, 3.0]  # differences 1 and 3
    found = judged(a, b)
    assert (found.loss_difference, found.loss_low, found.loss_high) == (2.0, 1.0, 3.0)
    assert found.perplexity_interval() == pytest.approx((math.exp(3), math.exp(5)))
    assert reference_of([{UNREACHABLE: "no", "ratio": 0.4}, b], ratio=0.4) is b


def test_table_picture_and_series(tmp_path):
    cells = cells_of(ROWS)
    ((title, table),) = tables(cells).items()
    assert title.startswith("Ratio 0.4") and [row[0] for row in table] == ["gamma", "2 *", "3.36", "5", "fisher joint"]
    assert table[2][2] == "the reference" and table[1][1] == "1.000"
    png, svg = draw_gamma(cells, math.exp(2), tmp_path / "gamma.png")
    text = svg.read_text()
    assert all(word in text for word in ("ratio 0.4", "Fisher joint", "published", "dense", "hollow"))
    first = png.read_bytes()
    draw_gamma(cells, math.exp(2), tmp_path / "gamma.png")
    assert png.read_bytes() == first
    found = children(cells)
    assert set(found) == {"ratio 0.4", "fisher joint"}
    assert found["ratio 0.4"][0].points == [(200, 1.0), (336, 1.5), (500, 1.2)]
    assert found["fisher joint"][0].points == [(40, 0.9)]


def test_settings_keep_the_published_gamma():
    assert Settings((8.0, 1.0)).grid == (1.0, gamma_sweep.PUBLISHED, 8.0)
