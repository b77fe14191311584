"""From rows to lines, sentences, MLflow series and pictures: by hand."""

import csv
import itertools
import math

import pytest

from nirvana.errors import InputError
from studies.lines import lines_of, listed, names_of, shown, worded, write_csv
from studies.measure import UNREACHABLE
from studies.picture import apart, draw, interval_of, log_ticks
from studies.spec import load_spec
from studies.words import series_of, verdict


def made_row(method, ratio, losses, compensation="none", achieved=None, seed=0, **more):
    row = {"method": method, "ratio": ratio, "compensation": compensation, "seed": seed, "parameters": 100}
    row |= {"achieved_ratio": ratio if achieved is None else achieved, "kl_divergence": 0.5, "losses": losses}
    row |= {"divergences": [0.0, 1.0], "saliency_seconds": 1.0, "compensation_seconds": 2.0, "evaluation_seconds": 3.0}
    return row | more


ROWS = [
    made_row("dense", 0.0, [1.0, 2.0]),
    made_row("fisher", 0.2, [2.0, 3.0], "least_squares"),
    made_row("flap", 0.2, [3.0, 4.0], achieved=0.206),
    made_row("random", 0.2, [4.0, 5.0]),
    made_row("random", 0.2, [6.0, 9.0], seed=1),
]
COMPARE = load_spec("compare")
(TABLE,) = COMPARE.tables


def by_method(rows=ROWS):
    return {line["method"]: line for line in lines_of(rows, TABLE)}


def test_lines_by_hand(tmp_path):
    found = by_method()
    assert list(found) == ["dense", "fisher", "flap", "random"]  # by ratio, then perplexity
    assert found["dense"]["token_perplexity"] == pytest.approx(math.exp(1.5))
    assert found["dense"]["loss_difference"] == -1  # against the reference of the least ratio
    assert [found["fisher"][name] for name in ("loss_difference", "low", "high")] == [0, 0, 0]
    assert (found["flap"]["loss_difference"], found["flap"]["off_budget"]) == (1, True)
    random = found["random"]  # windows: 5 and 7 over two seeds, 3 and 4 above the reference
    assert (random["seeds"], random["loss_difference"], random["low"], random["high"]) == (2, 3.5, 3, 4)
    assert random["token_perplexity"] == pytest.approx(math.exp(6)) and random["parameters"] == 100
    file = write_csv(list(found.values()), names_of(TABLE), tmp_path / "compare.csv")
    with file.open() as opened:
        rows = list(csv.DictReader(opened))
    assert [float(row["loss_difference"]) for row in rows] == [-1, 0, 1, 3.5]
    assert rows[2]["off_budget"] == "True" and list(rows[0])[:3] == ["method", "compensation", "ratio"]
    with pytest.raises(InputError, match="expected measurements, got none"):
        write_csv([], names_of(TABLE), tmp_path / "none.csv")


def test_the_first_pruned_one_is_the_reference_where_ours_is_missing():
    found = by_method([row for row in ROWS if row["method"] != "fisher"])
    assert found["flap"]["is_reference"] and found["random"]["loss_difference"] == 2.5


def test_a_table_says_the_reference_and_no_more_than_there_is():
    ((title, rows),) = shown(list(by_method().values()), TABLE).items()
    assert title.startswith("Methods by ratio") and rows[0][0] == "method"
    assert [row[-1] for row in rows[1:]] == [
        "-1.00 [-1.00, -1.00]",
        "the reference",
        "+1.00 [+1.00, +1.00]",
        "+3.50 [+3.00, +4.00]",
    ]
    assert worded("{a:.2f} {b:g}", {"a": 12345.0, "b": None}) == "1.23e+04"


def test_the_verdict_counts_who_is_significantly_apart():
    rows = [*ROWS, made_row("lm_loss", 0.2, [1.0, 4.5]), made_row("wanda_sp", 0.2, [1.0, 2.5])]
    (sentence,) = verdict(lines_of(rows, TABLE), COMPARE.verdict[0])
    assert "is significantly better (95 %) than 2 of 4 others" in sentence
    assert "not significantly apart from LM loss" in sentence and "significantly worse than Wanda-sp" in sentence
    # what else the reference's own method was tried with is no rival; of others each at its best
    more = [made_row("fisher", 0.2, [9.0, 9.0]), made_row("flap", 0.2, [1.0, 2.0], "bias")]
    (sentence,) = verdict(lines_of([*ROWS, *more], TABLE), COMPARE.verdict[0])
    assert "than 1 of 2 others, significantly worse than FLAP + bias" in sentence


def test_series_have_a_child_a_method_and_compensation():
    found = series_of(lines_of(ROWS, TABLE), COMPARE.series[0])
    assert list(found) == ["dense", "mask Fisher + LS", "FLAP", "random"]
    assert [(each.metric, each.points) for each in found["FLAP"]][1] == ("kl_divergence_by_ratio_percent", [(20, 0.5)])


MODULES = load_spec("modules")
SWEPT = [
    made_row("dense", 0.0, [2.0, 2.0]),
    made_row("fisher", 0.1, [3.0, 3.0], where="mlp"),
    made_row("fisher", 0.1, [4.0, 4.0], where="attention"),
    made_row("fisher", 0.1, [3.5, 3.5], where="both"),
    {"method": "fisher", "ratio": 0.2, "where": "attention", UNREACHABLE: "at most 0.16"},
    made_row("fisher", 0.2, [5.0, 5.0], where="both"),
]


def test_what_is_out_of_reach_is_said_and_written(tmp_path):
    (table,) = MODULES.tables
    lines = lines_of(SWEPT, table)
    first, second = verdict(lines, MODULES.verdict[0])
    assert "token_perplexity is least with mlp" in first and "-0.500 [-0.500, -0.500], significantly better" in first
    assert second.endswith("out of reach: attention.")
    rows = list(csv.DictReader(write_csv(listed(lines, table), names_of(table), tmp_path / "a.csv").open()))
    assert [row["unreachable"] for row in rows] == ["", "", "", "at most 0.16", ""] and rows[3]["kl_divergence"] == ""


def test_pictures_are_the_same_again(tmp_path):
    lines = {"": lines_of(SWEPT, MODULES.tables[0])}
    png, svg = draw(MODULES.picture, lines, "modules", tmp_path / "modules.png")
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 20_000
    first = svg.read_text()
    assert all(word in first for word in ("attention", "mlp", "both", "dense", "fisher: perplexity"))
    draw(MODULES.picture, lines, "modules", tmp_path / "modules.png")
    assert svg.read_text() == first


def test_an_interval_moves_with_the_reference():
    line = {"y": 4.0, "d": math.log(2), "low": 0.0, "high": math.log(4), "kl": 3.0, "a": 1.0, "b": 0.5, "c": 2.0}
    # the reference is at 2: the interval is 2 · 1 to 2 · 4
    assert interval_of(line, {"y": "y", "bars": ["d", "low", "high"], "bars_log": True}) == pytest.approx((2, 8))
    assert interval_of(line, {"y": "kl", "bars": ["a", "b", "c"]}) == (2.5, 4)
    assert interval_of(line, {"y": "kl", "bars": ["b", "c"]}) == (0.5, 2)
    assert interval_of(line, {"y": "kl", "bars": ["a"]}) == (2, 4)
    assert interval_of(line, {"y": "kl"}) == (3, 3)


def test_names_are_moved_apart_but_not_out_of_order():
    assert apart([10, 50, 90], 15, 100) == [10, 50, 90]
    assert apart([50, 50], 10, 100) == pytest.approx([45, 55])
    crowded = apart([0, 1, 2, 99, 100], 15, 100)
    assert all(b - a > 14.9 for a, b in itertools.pairwise(crowded))
    assert min(crowded) >= 0 and max(crowded) <= 100


def test_ticks_are_round():
    assert log_ticks(10, 1000) == [10, 100, 1000]
    assert log_ticks(40, 130) == [50, 70, 100]
