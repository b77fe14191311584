"""Accuracy lost: ratios of losses by hand, answers against checkpoints built by hand, nothing asked twice."""

import csv
import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
from sweeps import pruned_model
from tiny import random_ids, tiny_corpus, tiny_llama, tiny_sentence, tiny_tokenizer

from nirvana.compensation import compensate
from nirvana.errors import InputError
from nirvana.loading import load_model
from nirvana.walk import final_hidden_states
from studies import zero_shot as study
from studies.comparison import Comparison, Text, Texts
from studies.items import CONTINUATION, CORPUS, LAST_WORD, OTHER, ItemSet, item_sets
from studies.lines import names_of, write_csv
from studies.scoring import score_items
from studies.spec import load_spec
from studies.texts import read_text
from studies.variants import Variant
from studies.zero_shot import ALL, ALL_TEXTS, UNDEFINED, accuracy_interval, lines, ratio_of_losses, verdict
from tasks.corpus.documents import Document, write_documents
from tasks.evaluation.cloze import cloze_items
from tasks.evaluation.continuation import continuation_items
from tasks.sample_pool import split_documents

RATIO = 0.4
SETTINGS = (("nirvana", "none"), ("random", "least_squares"), ("flap", "bias"))


# --- ratios of losses -----------------------------------------------------------------------------------------


def test_ratio_of_losses_by_hand():
    """Theirs lose everything, ours two items of five: the ratio is Binomial(5, 0.4) / 5, whose cumulative
    probabilities are 0.078 at 0, 0.913 at 3 and 0.990 at 4.
    """
    found = ratio_of_losses([1] * 5, [0, 1, 0, 1, 1], [0] * 5, "abcde")
    assert found == (pytest.approx(0.4), 0, pytest.approx(0.8))


def test_what_stays_the_same_has_no_width():
    assert ratio_of_losses([1, 1, 1], [0.75, 0.75, 0.75], [0.5, 0.5, 0.5], "abb") == (0.5, 0.5, 0.5)


def test_ratio_of_losses_equals_every_possible_draw():
    dense, ours, theirs = np.array([[1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]])
    drawn = np.array(list(itertools.product(range(6), repeat=6)))
    ours_lost, theirs_lost = ((dense - each)[drawn].sum(axis=1) for each in (ours, theirs))
    ratios = np.divide(ours_lost, theirs_lost, out=np.full(len(drawn), np.inf), where=theirs_lost > 0)
    # no step of the distribution is near either edge: a sample of the draws finds the same
    edges = np.percentile(ratios, (1.9, 2.5, 3.1, 96.9, 97.5, 98.1), method="inverted_cdf")
    assert edges[0] == edges[2] < 0 < edges[3] == edges[5]  # ours answer one that dense does not
    found = ratio_of_losses(dense, ours, theirs, "abcdef")
    assert found == (pytest.approx(3 / 5), pytest.approx(edges[1]), pytest.approx(edges[4]))


@pytest.mark.parametrize("wrong", [0, 1, 3])
def test_a_loss_that_may_be_none_has_no_ratio(wrong):
    """Of ten items, three wrong: a draw misses all three with probability 0.7^10 = 0.028 > 0.025."""
    theirs = [0] * wrong + [1] * (10 - wrong)
    assert ratio_of_losses([1] * 10, [0] * 10, theirs, "abcdefghij") is None
    assert ratio_of_losses([1] * 10, [0] * 10, [0] * 5 + [1] * 5, "abcdefghij") is not None


def test_a_document_is_drawn_whole():
    """Ours lose one document's two items, theirs all six: of 27 draws 8 have no loss of ours and one nothing else."""
    found = ratio_of_losses([1] * 6, [0, 0, 1, 1, 1, 1], [0] * 6, "aabbcc")
    assert found == (pytest.approx(1 / 3), 0, 1)
    by_item = ratio_of_losses([1] * 6, [0, 0, 1, 1, 1, 1], [0] * 6, "abcdef")
    assert by_item is not None and by_item.high < 1


def test_accuracy_interval_by_hand():
    assert accuracy_interval([1, 0] * 5) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert accuracy_interval([0] * 10) == (0, pytest.approx(3.8415 / 13.8415, abs=1e-4))


# --- items ----------------------------------------------------------------------------------------------------


def speech(seed, sentences=80):
    generator = random.Random(f"speech {seed}")
    return " ".join(tiny_sentence(generator) for _ in range(sentences))


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("zero-shot") / "model", intermediate_size=256)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    speeches = sorted(tiny_corpus(directory / "speeches").iterdir())
    write_documents(directory / "documents.jsonl", [Document(each.name, each.read_text()) for each in speeches])
    return directory


def texts_of(*calibrated):
    """Return texts whose calibration windows are from the middle of documents."""
    windows = [tiny_tokenizer()(text)["input_ids"][200:264] for text in calibrated]
    return Texts(Text(torch.tensor(windows)), *(Text(random_ids(6, 16, seed)) for seed in range(1, 4)))


def test_items_are_of_evaluation_documents_and_none_is_calibrated_on(model_directory, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    speeches = {f"d{seed}": speech(seed) for seed in range(6)}
    file = tmp_path / "other.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in speeches.values()))
    seen = [speeches["d1"], speeches["d4"]]
    sets = item_sets(model_directory, texts_of(*seen), corpus, 30, file)
    assert [(each.text, each.kind, len(each.items)) for each in sets] == [
        (CORPUS, LAST_WORD, 18),
        (CORPUS, CONTINUATION, 12),
        ("other", LAST_WORD, 18),
        ("other", CONTINUATION, 12),
    ]
    rows = map(json.loads, (corpus / "documents.jsonl").read_text().splitlines())
    splits = split_documents([Document(row["id"], row["text"]) for row in rows])
    for each in sets:
        allowed, others = (splits[name] for name in ("evaluation", "calibration"))
        allowed, others = [document.text for document in allowed], [document.text for document in others]
        if each.text == "other":
            allowed, others = [text for text in speeches.values() if text not in seen], seen
        for item in each.items:
            assert any(item["context"] in text for text in allowed)
            assert not any(item["context"] in text for text in others)
    # without them among the calibration text, documents 1 and 4 have items as well
    free = [item for each in item_sets(model_directory, texts_of(speech(9)), corpus, 30, file) for item in each.items]
    assert any(item["context"] in text for text in seen for item in free)


def test_compensation_text_counts_as_calibration(model_directory, corpus):
    given = texts_of(speech(9))
    (first,) = (each for each in item_sets(model_directory, given, corpus, 20) if each.kind == CONTINUATION)
    context = first.items[0]["context"]
    ids = Text(torch.tensor([tiny_tokenizer()(context)["input_ids"]]))
    changed = Texts(given.calibration, ids, given.heldout, given.evaluation)
    contexts = [item["context"] for each in item_sets(model_directory, changed, corpus, 20) for item in each.items]
    assert context not in contexts and len(contexts) == 20


def test_where_last_words_are_few_there_are_more_continuations(model_directory, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few").mkdir()
    for seed in range(3):
        (tmp_path / "few" / f"{seed}.txt").write_text(speech(seed, 60))
    documents = [Document(str(seed), speech(seed, 60)) for seed in range(3)]
    with pytest.raises(InputError) as told:
        item_sets(model_directory, texts_of(speech(9)), corpus, 100, tmp_path / "few")
    held = [int(word) for word in str(told.value).split() if word.isdigit()][2:4]
    assert "\n" not in str(told.value)
    assert str(told.value).startswith("--items: expected 100 items from few, its 3 documents hold ")
    assert len(cloze_items(documents, held[0])) == held[0] < 40
    with pytest.raises(InputError):
        cloze_items(documents, held[0] + 1)
    sets = item_sets(model_directory, texts_of(speech(9)), corpus, sum(held), tmp_path / "few")
    assert [len(each.items) for each in sets if each.text == "few"] == held
    with pytest.raises(InputError, match="2 more share text with calibration"):
        item_sets(model_directory, texts_of(speech(0, 60), speech(2, 60)), corpus, sum(held), tmp_path / "few")


def test_a_text_of_the_corpus_name_gets_another(model_directory, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text(speech(0, 200))
    sets = item_sets(model_directory, texts_of(speech(9)), corpus, 10, tmp_path / "corpus.txt")
    assert {each.text for each in sets} == {CORPUS, OTHER}


@pytest.mark.parametrize(("name", "content"), [("a.txt", "Short."), ("a.jsonl", '{"words": "x"}'), ("a.txt", None)])
def test_an_odd_text_gives_one_line(name, content, model_directory, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=r"^--(text|items)") as told:
        item_sets(model_directory, texts_of(speech(9)), corpus, 10, tmp_path / name)
    assert "\n" not in str(told.value) and len(str(told.value)) < 300


def test_text_files_are_documents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (("b", "two"), ("a", "one"), ("c", " ")):
        (tmp_path / f"{name}.txt").write_text(text)
    assert read_text(tmp_path, "--text") == [Document("a", "one"), Document("b", "two")]


# --- answers --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sets(model_directory):
    """Every other last word is the dense model's own likeliest, so that some are right."""
    documents = [Document(str(seed), speech(seed)) for seed in range(6)]
    model, tokenizer = load_model(model_directory), tiny_tokenizer()
    words = cloze_items(documents, 16)
    for item in words[::2]:
        ids = tokenizer.encode(item["context"])
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        text = item["context"] + tokenizer.decode(token)
        if tokenizer.encode(text) == [*ids, token]:
            item["target"] = text.removeprefix(item["context"])
    return [ItemSet("few", LAST_WORD, words), ItemSet("few", CONTINUATION, continuation_items(documents, 24))]


@pytest.fixture
def zero_shot(model_directory, tmp_path, monkeypatch):
    """Its cache goes beside the test; ten items a block."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "BLOCK", 10)
    return opened(model_directory)


def opened(model_directory):
    return Comparison(model_directory, Texts(*(Text(random_ids(6, 16, seed)) for seed in range(4))), round_to=1)


def measure(comparison, sets, ways, ratio=RATIO):
    variants = [Variant(), *(Variant(name, ratio, way) for name, way in ways)]
    for each in variants:
        each.check(comparison)
    return study.answered(comparison, [(each, {}) for each in variants], sets)


def asked_of(comparison, variant, items):
    (row,) = study.answered(comparison, [(variant, {})], [items])
    return row


def count_asked(monkeypatch, dies_after=math.inf):
    """Count the items that are scored."""
    asked = []

    def counting(hidden_of, head, items, *more):
        if len(asked) >= dies_after:
            raise KeyboardInterrupt
        asked.append(len(items))
        return score_items(hidden_of, head, items, *more)

    monkeypatch.setattr(study, "score_items", counting)
    return asked


@torch.no_grad()
def answers_of(model, items):
    """Answer by transformers alone, a sequence at a time."""
    tokenizer, answers = tiny_tokenizer(), []
    for item in items:
        scores = []
        for text in item.get("choices") or [item["target"]]:
            start, ids = len(tokenizer.encode(item["context"])), tokenizer.encode(item["context"] + text)
            logs = model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
            targets = torch.tensor(ids[start:])
            if "target" in item:
                answers.append(int(torch.equal(logs.argmax(-1), targets)))
            else:
                scores.append(float(logs.gather(1, targets[:, None]).sum()) / len(text))
        if scores:
            answers.append(int(int(np.argmax(scores)) == item["label"]))
    return answers


def test_answers_are_those_of_checkpoints(zero_shot, sets, model_directory, tmp_path):
    keep = zero_shot.keep(Variant("nirvana", RATIO))
    dense, pruned = load_model(model_directory), pruned_model(model_directory, keep, RATIO, tmp_path / "pruned")
    for each in sets:
        expected = answers_of(dense, each.items)
        assert asked_of(zero_shot, Variant(), each)["answers"] == expected and 0 < sum(expected) < len(expected)
        row = asked_of(zero_shot, Variant("nirvana", RATIO), each)
        assert row["answers"] == answers_of(pruned, each.items) != expected
        assert row["achieved_ratio"] == pytest.approx(RATIO, abs=0.005)


def test_compensated_answers(zero_shot, sets):
    ours = asked_of(zero_shot, Variant("random", RATIO, "least_squares"), sets[1])["answers"]
    stack, keep = zero_shot.stack, zero_shot.keep(Variant("random", RATIO))
    updates = dict(compensate(stack, keep, zero_shot.texts.compensation.ids, zero_shot.ridge))
    found = score_items(
        lambda ids: final_hidden_states(stack, ids, keep, updates),
        stack.head_weight(),
        sets[1].items,
        tiny_tokenizer(),
    )
    assert ours == found.astype(int).tolist()
    plain = asked_of(zero_shot, Variant("random", RATIO), sets[1])["answers"]
    assert ours != plain


def test_nothing_is_asked_twice(zero_shot, sets, model_directory, monkeypatch):
    asked = count_asked(monkeypatch)
    rows = measure(zero_shot, sets, SETTINGS)
    assert rows[0]["documents"] == [item["document"] for item in sets[0].items]
    assert asked == 4 * [10, 6, 10, 10, 4] and [len(row["answers"]) for row in rows] == 4 * [16, 24]
    asked.clear()
    again = opened(model_directory)
    assert measure(again, sets, SETTINGS) == rows and asked == []
    assert "stack" not in vars(again)  # nothing was opened
    more = (*SETTINGS, ("magnitude", "none"))
    assert measure(again, sets, more)[:8] == rows and asked == [10, 6, 10, 10, 4]
    asked.clear()
    # the first n are the same for every count: two blocks are known
    fewer = [ItemSet("few", CONTINUATION, sets[1].items[:23])]
    measure(again, fewer, ())
    assert asked == [3]


def test_other_texts_are_other_answers(zero_shot, sets, model_directory, monkeypatch):
    measure(zero_shot, sets, SETTINGS)
    asked = count_asked(monkeypatch)
    texts = Texts(*(Text(random_ids(6, 16, seed)) for seed in (0, 11, 12, 13)))
    measure(Comparison(model_directory, texts, round_to=1), sets, SETTINGS)
    assert len(asked) == 2 * 5  # those that are compensated on the second; the last two are not read
    asked.clear()
    texts = Texts(*(Text(random_ids(6, 16, seed)) for seed in (10, 1, 2, 3)))
    measure(Comparison(model_directory, texts, round_to=1), sets, SETTINGS)
    assert len(asked) == 2 * 5  # all but dense, and but random, which keeps the same units whatever it reads


def test_a_killed_study_goes_on_where_it_was(zero_shot, sets, model_directory, monkeypatch):
    asked = count_asked(monkeypatch, dies_after=7)
    with pytest.raises(KeyboardInterrupt):
        measure(zero_shot, sets, SETTINGS)
    asked = count_asked(monkeypatch)
    rows = measure(opened(model_directory), sets, SETTINGS)
    assert len(asked) == 4 * 5 - 7 and len(rows) == 8


@pytest.mark.parametrize(
    ("way", "said"),
    [(("flop", "none"), "got 'flop'"), (("flap", "lora"), "got lora")],
)
def test_an_unknown_way_is_named_before_anything_runs(way, said, zero_shot, sets):
    with pytest.raises(InputError, match=said):
        measure(zero_shot, sets, (way,))
    assert "stack" not in vars(zero_shot)


# --- tables, sentences, picture ---------------------------------------------------------------------------------


def made_row(method, ratio, kind, wrong, compensation="none", count=20, text="corpus"):
    return {
        "text": text,
        "kind": kind,
        "method": method,
        "ratio": ratio,
        "compensation": compensation,
        "achieved_ratio": ratio,
        "answers": [0] * wrong + [1] * (count - wrong),
        "documents": [f"{kind} {number}" for number in range(count)],
        "seconds": 2.0 * count,
    }


def made_rows(text="corpus"):
    return [
        made_row(method, ratio, kind, wrong, compensation, text=text)
        for method, ratio, compensation, wrongs in [
            ("dense", 0.0, "none", (0, 0)),
            ("nirvana", 0.2, "none", (10, 1)),
            ("fisher", 0.2, "least_squares", (5, 0)),
            ("nirvana", 0.4, "none", (20, 20)),
            ("fisher", 0.4, "least_squares", (10, 10)),
            ("flap", 0.4, "bias", (20, 20)),
            ("flap", 0.4, "none", (20, 19)),
        ]
        for kind, wrong in zip((LAST_WORD, CONTINUATION), wrongs, strict=True)
    ]


def test_lines_by_hand(tmp_path):
    found = lines(made_rows(), {})
    assert [line["kind"] for line in found] == 7 * [LAST_WORD] + 7 * [CONTINUATION] + 7 * [ALL]
    of = {(line["kind"], line["method"], line["ratio"], line["compensation"]): line for line in found}
    line = of[(LAST_WORD, "fisher", 0.2, "least_squares")]
    assert (line["accuracy"], line["lost"], line["of_nirvana"], line["items"]) == (0.75, 0.25, 0.5, 20)
    assert (
        0.05 <= line["lost_low"] < 0.25 < line["lost_high"] <= 0.45
        and line["of_nirvana_low"] < 0.5 < line["of_nirvana_high"]
    )
    # nirvana's one wrong item of twenty is not significantly a loss
    assert of[(CONTINUATION, "fisher", 0.2, "least_squares")]["of_nirvana"] == UNDEFINED
    together = of[(ALL, "fisher", 0.2, "least_squares")]
    assert (together["items"], together["lost"], together["of_nirvana"]) == (40, 5 / 40, pytest.approx(5 / 11))
    assert together["seconds_per_item"] == 2.0
    assert of[(LAST_WORD, "nirvana", 0.4, "none")]["of_nirvana"] == 1

    with write_csv(found, names_of(load_spec("zero_shot").tables[0]), tmp_path / "zero_shot.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 21
    by_name = {(row["kind"], row["method"], row["ratio"]): row["of_nirvana"] for row in rows}
    assert by_name[(CONTINUATION, "fisher", "0.2")] == UNDEFINED and by_name[(LAST_WORD, "dense", "0.0")] == ""
    assert by_name[(LAST_WORD, "fisher", "0.2")] == "0.5"


def test_sentences():
    found = {"": lines(made_rows(), {})}
    sentences = verdict(found, [], {})
    assert len(sentences) == 6 and sentences[0].startswith("corpus, ratio 0.2, all: mask Fisher + LS loses 12.5")
    (unsure,) = (each for each in sentences if "undefined" in each)
    assert unsure.startswith(f"corpus, ratio 0.2, {CONTINUATION}:")
    (told,) = (each for each in sentences if each.startswith(f"corpus, ratio 0.4, {CONTINUATION}"))
    assert "loses 50.0 points, NIRVANA 100.0; their ratio is 0.50 [0." in told and "not significantly apart" in told
    (alone,) = verdict({"": [line for line in found[""] if line["method"] != "nirvana"]}, [], {})
    assert alone.startswith("No ratio of losses")


def test_several_texts_are_judged_together_as_well():
    found = lines([*made_rows(), *made_rows("other")], {})
    (line,) = (x for x in found if (x["text"], x["method"], x["ratio"]) == (ALL_TEXTS, "fisher", 0.2))
    assert (line["kind"], line["items"], line["lost"], line["of_nirvana"]) == (ALL, 80, 10 / 80, pytest.approx(10 / 22))
    assert verdict({"": found}, [], {})[0].startswith("all texts, ratio 0.2, all: mask Fisher + LS loses 12.5 points")
    assert line["documents"] == 80  # the texts call theirs alike


def test_items_of_one_document_tell_less():
    rows = made_rows()
    together = [{**row, "documents": [str(number // 2) for number in range(20)]} for row in rows]
    asked = (LAST_WORD, "fisher", 0.2)
    (apart,), (near,) = (
        [x for x in lines(each, {}) if (x["kind"], x["method"], x["ratio"]) == asked] for each in (rows, together)
    )
    assert (near["accuracy"], near["lost"], near["of_nirvana"]) == (
        apart["accuracy"],
        apart["lost"],
        apart["of_nirvana"],
    )
    assert near["lost_low"] < apart["lost_low"] < apart["lost_high"] < near["lost_high"]
    assert (near["documents"], apart["documents"]) == (10, 20)


def test_of_few_documents_items_are_drawn():
    """One file of text is one document: drawn whole, it would leave no width."""
    few = lines([{**row, "documents": ["only"] * 20} for row in made_rows()], {})
    for one, apart in zip(few, lines(made_rows(), {}), strict=True):
        assert one["documents"] == 1 and (one["lost_low"], one["lost_high"]) == (apart["lost_low"], apart["lost_high"])


def test_each_text_decides_whether_its_documents_are_drawn():
    """A text of one document beside one of many: the first gives items, and as many of them as it has."""
    book = [{**row, "documents": ["0"] * 20} for row in made_rows("book")]
    found = {
        (x["text"], x["kind"]): x
        for x in lines([*made_rows(), *book], {})
        if (x["method"], x["ratio"]) == ("fisher", 0.2)
    }
    assert [found[key]["drawn"] for key in (("book", ALL), ("corpus", ALL), (ALL_TEXTS, ALL))] == [
        "items", "documents", "documents or items"
    ]  # fmt: skip
    assert found[(ALL_TEXTS, ALL)]["documents"] == 41
    # of each text a draw has 40 items: 2.5 points each way are 2 of 80, and a whole document of 40 would be 50
    assert found[(ALL_TEXTS, ALL)]["lost_high"] - found[(ALL_TEXTS, ALL)]["lost_low"] < 0.2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (4, "significantly at most half"),
        (10, "not significantly apart from half"),
        (17, "significantly more than half"),
    ],
)
def test_a_share_is_held_against_half(wrong, said):
    rows = [
        made_row("dense", 0.0, LAST_WORD, 0),
        made_row("nirvana", 0.4, LAST_WORD, 20),
        made_row("fisher", 0.4, LAST_WORD, wrong, "least_squares"),
    ]
    (sentence,) = verdict({"": lines(rows, {})}, [], {})
    assert sentence.endswith(f"], {said}.")


def test_ours_is_held_against_every_other():
    rows = made_rows()
    found = {(x["kind"], x["method"], x["compensation"]): x for x in lines(rows, {}) if x["ratio"] == 0.4}
    line = found[(LAST_WORD, "flap", "bias")]  # ours have ten of twenty right, it none
    assert line.get("behind_best") == 0.5 and 0.2 < line["behind_best_low"] < 0.5 < line["behind_best_high"] < 0.8
    assert "behind_best" not in found[(LAST_WORD, "fisher", "least_squares")]
    assert all(line.get("behind_best") is None for line in lines(rows, {}) if line["method"] == "dense")
    sentence = next(
        each for each in verdict({"": lines(rows, {})}, [], {}) if each.startswith("corpus, ratio 0.4, all")
    )
    assert sentence.endswith(" It is significantly better (95 %) than 3 of 3 others.")
    # as good, and better
    rows += [made_row("magnitude", 0.4, LAST_WORD, 10), made_row("random", 0.4, LAST_WORD, 0)]
    sentence = next(
        each for each in verdict({"": lines(rows, {})}, [], {}) if each.startswith(f"corpus, ratio 0.4, {LAST_WORD}")
    )
    assert sentence.endswith(
        "than 3 of 5 others, not significantly apart from magnitude, significantly worse than random."
    )
