"""The calibration study: draws as the pipeline's, statistics by hand, plans judged as built, nothing computed twice."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import random_ids, tiny_corpus, tiny_llama

from nirvana.divergence import kl_divergence
from nirvana.errors import InputError
from nirvana.files import write_json
from nirvana.methods.registry import METHODS
from nirvana.saliency import channel_saliency, unit_saliency
from nirvana.walk import Stack, final_hidden_states
from studies import methods as registry
from studies.calibration import (
    Study,
    chance_of_selection,
    correlations,
    domains,
    matching,
    plans,
    spearman,
    spearman_interval,
    summary,
    verdict,
)
from studies.comparison import Comparison, Text, Texts
from studies.sources import Source, corpus_source, ids_source
from studies.spec import load_spec
from studies.variants import Variant
from tasks import sample_pool
from tasks.corpus.documents import Document, write_documents

SETTINGS = load_spec("calibration_study").values(False, {}) | dict(  # noqa: C408
    ratio=0.4,
    candidates=4,
    sequences=2,
    length=16,
    averaged=[2, 4, 9],
    groups=1,
    counts=(2, 4, 500),
    lengths=(8, 16),
    length_tokens=32,
    draws=2,
    other_candidates=3,
)
"""Averages of 2 and 4; of 500 sequences there are too few."""


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("calibration") / "model", intermediate_size=256)


def drawn(seed):
    def take(batches, sequences, length):
        if batches * sequences > 16:
            raise InputError("expected less, got more; ask for less")
        return random_ids(16, length, seed)[: batches * sequences].reshape(batches, sequences, length)

    return take


def source(name, seed):
    return Source(name, Text(random_ids(3, 16, seed)), Text(random_ids(4, 16, seed + 1)), drawn(seed + 2))


CORPUS, OTHER = source("corpus", 0), source("ids", 10)


@pytest.fixture
def calibration(model_directory, tmp_path, monkeypatch):
    """Its cache goes beside the test."""
    monkeypatch.chdir(tmp_path)
    found = Study(model_directory, SETTINGS)
    found.by(CORPUS)
    return found


# --- texts ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    speeches = sorted(tiny_corpus(directory / "speeches").iterdir())
    write_documents(directory / "documents.jsonl", [Document(file.name, file.read_text()) for file in speeches])
    return directory


def small_params(**changed):
    asked = {"seed": 0, "pool_size": 3, "sequences": 4, "sequence_length": 16, "add_bos": False}
    asked |= {"heldout_sequences": 2, "heldout_length": 24, "repeated": 0.0} | changed
    return SimpleNamespace(
        calibration=SimpleNamespace(**asked), compensation=SimpleNamespace(method="none", sequence_length=16)
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_candidates_are_the_pipelines(seed, model_directory, documents, tmp_path):
    params = small_params(seed=seed)
    outputs = {name: tmp_path / f"{name}.safetensors" for name in ("candidates", "heldout", "compensation_corpus")}
    outputs["evaluation_data"] = tmp_path / "evaluation"
    sample_pool.run(params, {"model": model_directory, "corpus": documents}, outputs)
    found = corpus_source(params, model_directory, documents, tokens=300)
    theirs = load_file(outputs["candidates"])["input_ids"]
    ours = torch.stack([text.ids for text in found.batches(3, 4, 16)])
    assert torch.equal(ours, theirs)
    assert torch.equal(torch.stack([text.ids for text in found.batches(5, 4, 16)])[:3], theirs)
    assert torch.equal(found.heldout.ids, load_file(outputs["heldout"])["input_ids"])
    assert found.evaluation.ids.shape == (3, 128) and (found.evaluation.ids[:, 0] == 0).all()  # BOS


def test_as_many_batches_as_there_is_text_for(model_directory, documents):
    found = corpus_source(small_params(), model_directory, documents, tokens=128)
    assert len(found.as_many(2, 4, 16)) == 2
    longest = found.as_many(50, 1, 400)
    assert 0 < len(longest) < 50 and len(longest) == len(found.as_many(len(longest), 1, 400))
    assert found.as_many(3, 4, 100_000) == []
    with pytest.raises(InputError, match="expected 3 x 4 sequences of 100000 tokens") as raised:
        found.batches(3, 4, 100_000)
    assert "\n" not in str(raised.value)


def test_ids_are_taken_in_order(tmp_path):
    for number, name in enumerate(("calibration", "calibration_extra", "heldout", "evaluation")):
        write_json(tmp_path / f"{name}_ids.json", random_ids(4, 8, number).tolist())
    found = ids_source(tmp_path, tokens=27)
    rows = torch.cat([random_ids(4, 8, 0), random_ids(4, 8, 1)])
    assert torch.equal(torch.cat([text.ids for text in found.batches(2, 3, 6)]), rows[:6, :6])
    assert torch.equal(found.heldout.ids, random_ids(4, 8, 2))
    assert torch.equal(found.evaluation.ids, random_ids(4, 8, 3)[:3])
    assert len(ids_source(tmp_path, tokens=10_000).evaluation.ids) == 4
    assert len(found.as_many(5, 3, 8)) == 2
    with pytest.raises(InputError, match="expected 3 x 3 sequences of 8 tokens to calibrate on, got 8 of 8"):
        found.batches(3, 3, 8)


# --- plans ----------------------------------------------------------------------------------------------------


def test_a_candidates_row_is_the_comparisons(calibration, model_directory):
    (text,) = CORPUS.batches(1, 4, 16)
    row = calibration.judged(calibration.keep(calibration.saliency(text)), CORPUS)
    given = Texts(text, text, CORPUS.heldout, CORPUS.evaluation)
    expected = Comparison(model_directory, given, round_to=8).row(Variant("nirvana", 0.4))
    assert row == {name: expected[name] for name in ("kl_divergence", "losses")}
    dense = calibration.judged(None, CORPUS)
    assert dense["kl_divergence"] == pytest.approx(0, abs=1e-7)
    assert dense["losses"] == Comparison(model_directory, given).dense()["losses"]


def test_the_best_are_averaged_as_in_the_pipeline(calibration, model_directory):
    pool, scores = CORPUS.batches(4, 2, 16), [0.4, 0.1, 0.3, 0.2]
    stack = Stack.open(model_directory)
    sites = stack.architecture.sites()
    each = [unit_saliency(sites, channel_saliency(stack, text.ids).sums) for text in pool]
    found = list(calibration.averages(pool, scores, SETTINGS))
    assert [(part, count, number) for part, count, number, _ in found] == [
        ("best", 2, 0),
        ("any", 2, 0),
        ("best", 4, 0),
    ]
    for (_, _, _, keep), members in zip(found, [(1, 3), (0, 1), range(4)], strict=True):
        mean = {site.name: torch.stack([each[i][site.name] for i in members]).mean(0).numpy() for site in sites}
        expected = calibration.keep(mean)
        assert all(np.array_equal(keep[name], expected[name]) for name in expected)
    assert not list((calibration.model_directory / ".cache").glob("*"))


def test_rows(calibration, model_directory):
    rows = plans(calibration, CORPUS, OTHER, SETTINGS)
    parts = {part: matching(rows, part=part) for part in dict.fromkeys(row["part"] for row in rows)}
    assert {part: len(each) for part, each in parts.items()} == {
        "dense": 2,
        "candidate": 2 * (4 + 3),
        "best": 2,
        "any": 1,
        "count": 2 + 2,
        "length": 2 + 2,
    }
    assert {(row["sequences"], row["length"]) for row in parts["length"]} == {(4, 8), (2, 16)}
    # two sequences of 16 tokens are a candidate, whatever part asks for them
    own = matching(parts["candidate"], calibrated_on="corpus", judged_on="corpus")
    for part, number in itertools.product(("count", "length"), range(2)):
        (row,) = matching(parts[part], sequences=2, length=16, draw=number)
        assert row["losses"] == own[number]["losses"]
    stack = Stack.open(model_directory)
    keep = calibration.keep(calibration.saliency(OTHER.batches(3, 2, 16)[2]))
    expected = kl_divergence(stack, keep, CORPUS.heldout.ids, final_hidden_states(stack, CORPUS.heldout.ids))
    (row,) = matching(parts["candidate"], calibrated_on="ids", judged_on="corpus", draw=2)
    assert row["kl_divergence"] == pytest.approx(expected, rel=1e-6)
    alone = plans(calibration, CORPUS, None, SETTINGS)
    assert alone == [row for row in rows if (row["calibrated_on"] in ("", "corpus")) and row["judged_on"] == "corpus"]


def counted(monkeypatch):
    """Count how often nirvana scores."""
    calls, original = [], METHODS["nirvana"].scorer

    def scorer(stack, ids, scoring):
        calls.append(1)
        return original(stack, ids, scoring)

    # the wrapper's code would be this test's, which is no part of the project's code
    monkeypatch.setattr(registry, "study_key", lambda parts, code: "key" + str(abs(hash(str(parts)))))
    monkeypatch.setattr("nirvana.methods.nirvana.nirvana", scorer)
    return calls


def test_a_killed_study_goes_on_and_a_second_run_computes_nothing(model_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scored, judged, original = counted(monkeypatch), [], Comparison.judged_by

    def dies(self, hidden_of):
        if len(judged) == 5:
            raise KeyboardInterrupt
        judged.append(1)
        return original(self, hidden_of)

    def again():
        found = Study(model_directory, SETTINGS)
        found.by(CORPUS)
        return found

    monkeypatch.setattr(Comparison, "judged_by", dies)
    with pytest.raises(KeyboardInterrupt):
        plans(again(), CORPUS, None, SETTINGS)
    before = len(scored)
    monkeypatch.setattr(Comparison, "judged_by", lambda self, *given: judged.append(1) or original(self, *given))
    rows = plans(again(), CORPUS, None, SETTINGS)
    different = {(tuple(row["losses"]), row["kl_divergence"]) for row in rows}
    assert len(judged) == len(different)  # each plan once, although candidates are counts and lengths too
    assert before == 4 and len(scored) == 4 + 2 + 2  # and 4 sequences of 16, 4 of 8 tokens
    judged.clear()
    scored.clear()
    last = again()
    assert plans(last, CORPUS, None, SETTINGS) == rows and judged == scored == []
    assert "stack" not in vars(last.by(CORPUS))  # nothing was opened


def test_what_cannot_be_is_one_line(calibration, tmp_path):
    for changed, message in (
        ({"method": "flop"}, "expected some of nirvana, fisher, .*, got 'flop'"),
        ({"method": "shortgpt"}, "expected some that remove units, got shortgpt"),
        ({"candidates": 99}, "expected less, got more"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            plans(Study(calibration.model_directory, SETTINGS | changed), CORPUS, None, SETTINGS | changed)
        assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="expected documents") as raised:
        corpus_source(small_params(), tmp_path, tmp_path, 128)
    assert "\n" not in str(raised.value)


# --- statistics -----------------------------------------------------------------------------------------------


def test_spearman_by_hand():
    assert spearman([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # 1 − 6 Σd² / (n (n² − 1)) with d = 0, 1, 1, 0
    assert spearman([1, 2, 3, 4], [5, 7, 6, 8]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    # ranks 1, 2.5, 2.5 against 1, 2, 3: Σab = 1.5, Σa² = 1.5, Σb² = 2
    assert spearman([0, 4, 4], [1, 2, 3]) == pytest.approx(1.5 / math.sqrt(1.5 * 2))
    assert math.isnan(spearman([1, 1], [1, 2]))


@pytest.mark.parametrize("levels", [3, 1000])
def test_spearman_is_scipys(levels):
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(levels)
    for _ in range(20):
        x, y = generator.integers(levels, size=(2, 12))
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, nan_ok=True)


def test_spearman_interval():
    x = np.arange(30.0)
    sure = spearman_interval(x, x**3, samples=200)
    assert sure == (pytest.approx(1),) * 3
    noise = np.random.default_rng(0).normal(size=30)
    unsure = spearman_interval(x, noise, samples=500)
    assert unsure.low < 0 < unsure.high and unsure.low < unsure.difference < unsure.high
    assert 0.5 < unsure.high - unsure.low < 1  # about 2 · 1.96 / √30


@pytest.mark.parametrize("pool_size", [1, 2, 3, 4])
def test_chances_are_those_of_all_pools(pool_size):
    scores = [0.3, 0.1, 0.4, 0.2]
    pools = list(itertools.combinations(range(4), pool_size))
    winners = [min(pool, key=lambda index: scores[index]) for pool in pools]
    expected = [winners.count(index) / len(pools) for index in range(4)]
    assert chance_of_selection(scores, pool_size) == pytest.approx(expected)


def made(part, kl, losses, on="corpus", by="corpus", **named):
    found = {"part": part, "calibrated_on": by, "judged_on": on, "kl_divergence": kl, "losses": losses}
    return {"sequences": 8, "length": 128, "averaged": 1, "draw": 0} | found | named


ROWS = [
    made("dense", 0.0, [1.0, 1.0], by=""),
    made("dense", 0.0, [2.0, 2.0], "ids", ""),
    made("candidate", 0.3, [2.0, 3.0], draw=0),
    made("candidate", 0.1, [1.0, 2.0], draw=1),
    made("candidate", 0.2, [0.0, 4.0], draw=2),
    made("candidate", 0.6, [5.0, 5.0], "ids", draw=0),
    made("candidate", 0.7, [4.0, 5.0], "ids", draw=1),
    made("candidate", 0.8, [6.0, 6.0], "ids", draw=2),
    made("candidate", 0.4, [3.0, 3.0], "corpus", "ids"),
    made("candidate", 0.5, [3.0, 4.0], "ids", "ids"),
    made("best", 0.1, [1.0, 1.0], averaged=2),
    made("any", 0.2, [2.0, 2.0], averaged=2),
    made("count", 0.3, [2.0, 2.0], sequences=4),
    made("count", 0.3, [2.0, 4.0], sequences=4, draw=1),
    made("length", 0.3, [2.0, 2.0], length=64),
]


def test_lines_by_hand():
    found = {line["variant"]: line for line in summary([row | {"pool_size": 2} for row in ROWS], {})}
    assert list(found) == [
        "any one",
        "lowest KL of 2, expected",
        "lowest KL of 3",
        "best in hindsight",
        "mean of the best 2",
        "mean of any 2",
        "4 × 128 tokens",
        "8 × 64 tokens",
    ]
    blind, chosen = found["any one"], found["lowest KL of 3"]
    assert (blind["token_perplexity"], blind["gain"]) == (pytest.approx(math.exp(2)), 0)  # windows: 1 and 3
    assert blind["deviation"] == pytest.approx(0.5) and blind["plans"] == 3  # of 2.5, 1.5, 2
    assert (chosen["gain"], chosen["low"], chosen["high"]) == (pytest.approx(0.5), pytest.approx(0), pytest.approx(1))
    # of the three pools of two, two hold the best, one the others: 2/3 of 1.5, 1/3 of 2
    assert found["lowest KL of 2, expected"]["gain"] == pytest.approx(2 - (2 * 1.5 + 2) / 3)
    assert found["lowest KL of 2, expected"]["kl_divergence"] == pytest.approx((2 * 0.1 + 0.2) / 3)
    assert found["best in hindsight"]["gain"] == chosen["gain"]
    assert found["mean of any 2"]["gain"] == 0 and found["mean of any 2"]["deviation"] is None
    assert found["4 × 128 tokens"]["deviation"] == pytest.approx(math.sqrt(0.5))


def test_correlations_and_domains_by_hand():
    found = correlations(ROWS, "corpus")
    assert found["corpus"].difference == pytest.approx(1)  # KL 3 1 2, losses 2.5 1.5 2
    assert found["ids"].difference == pytest.approx(0.5)  # 5, 4.5, 6
    pairs = {(pair["calibrated_on"], pair["judged_on"]): pair for pair in domains(ROWS, {})}
    assert len(pairs) == 4
    away = pairs[("corpus", "ids")]
    assert (away["plans"], away["loss_increase"]) == (3, pytest.approx(31 / 6 - 2))
    assert away["disadvantage"] == pytest.approx(31 / 6 - 3.5) and away["low"] > 0
    assert pairs[("ids", "ids")]["disadvantage"] == 0
    assert pairs[("ids", "corpus")]["token_perplexity"] == pytest.approx(math.exp(3))
    assert domains([row for row in ROWS if row["judged_on"] == "corpus" != row["calibrated_on"]], {}) == []


def test_sentences():
    tables = {"summary": summary([row | {"pool_size": 2} for row in ROWS], {}), "domains": domains(ROWS, {})}
    told = verdict(tables, ROWS, {})
    assert told[0].startswith("KL on the held-out batch ranks 3 batches as perplexity does, Spearman on corpus 1.00")
    assert "on ids 0.50" in told[0] and any("mean of the best 2 +1.000" in each for each in told)
    assert told[-1].startswith("Judged on") and any("a batch of ids loses +1.000" in each for each in told)
