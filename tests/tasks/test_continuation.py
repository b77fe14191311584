"""Plausible endings: what makes an item, that nothing but the passage tells the endings apart, and lm-eval's view."""

import json
import random

import pytest
from tiny import tiny_llama, tiny_sentence, tiny_tokenizer

from nirvana.errors import InputError
from tasks.corpus.documents import Document
from tasks.evaluation.continuation import continuation_items, write_continuation_task

# 43 words; none of its sentences ends in six words that can be a choice
FAR = (
    "It took the Farmers of the Valley ten years to be given a Railway by the Crown. "
    "In Spring a commission of seven was sent out from the Capital to measure the Land. "
)
NEAR = "The first of its reports to the Crown said "
ENDING = "that nothing would serve them so well."
# as many words, 32 to 39 characters, the same first word
RIVALS = (
    "that grain was sold for half price.",
    "that each of them had paid debts.",
    "that bread was dear in those days.",
)


def told(rivals):
    return " ".join(f"The Baker has told us {rival}" for rival in rivals)


def test_item_by_hand():
    (item,) = continuation_items([Document("a", FAR + NEAR + ENDING + " " + told(RIVALS))], 1)
    assert item["context"] == (FAR + NEAR).strip()
    assert set(item["choices"]) == {f" {text}" for text in (ENDING, *RIVALS)}
    assert item["choices"][item["label"]] == f" {ENDING}"
    assert item["document"] == "a"


@pytest.mark.parametrize(
    "rival",
    [
        "that is all.",
        "that bread was dear in those old days.",  # a word more
        "which bread was dear in those days.",  # another first word
        ENDING,  # the true one
        "that Bread was dear in those days.",  # a capital
        "that bread was dearer for 90 days.",  # a number
        "that bread was dear in those days!",  # another stop
        'that bread was "dear" in those days.',  # a quote
        "that international merchants nevertheless immediately disembarked there.",  # as many words, longer
    ],
)
def test_endings_that_are_no_rival(rival):
    with pytest.raises(InputError, match="hold 0"):
        continuation_items([Document("a", FAR + NEAR + ENDING + " " + told((*RIVALS[:2], rival)))], 1)


def test_a_sentence_of_the_passage_gives_no_rival():
    """It would be an ending that was just read."""
    text = FAR + told(RIVALS[:1]) + " " + NEAR + ENDING + " " + told(RIVALS[1:])
    with pytest.raises(InputError, match="hold 0"):
        continuation_items([Document("a", text)], 1)


def test_no_rival_comes_from_another_document():
    with pytest.raises(InputError, match=r"evaluation\.continuation_items: expected 1 items, the 2 evaluation doc"):
        continuation_items([Document("a", FAR + NEAR + ENDING), Document("b", told(RIVALS))], 1)


def test_a_space_before_the_stop_is_no_obstacle():
    """As WikiText has it."""
    text = (FAR + NEAR + ENDING + " " + told(RIVALS)).replace(".", " .")
    (item,) = continuation_items([Document("a", text)], 1)
    assert item["context"] == (FAR + NEAR).replace(".", " .").strip()
    assert all(choice.endswith(" .") for choice in item["choices"])


@pytest.fixture(scope="module")
def documents():
    generator = random.Random(0)
    return [Document(f"d{number}", " ".join(tiny_sentence(generator) for _ in range(120))) for number in range(30)]


@pytest.fixture(scope="module")
def items(documents):
    return continuation_items(documents, 300)


def test_only_the_passage_tells_the_choices_apart(items):
    for item in items:
        choices = item["choices"]
        assert len(set(choices)) == 4
        assert len({choice.split()[0] for choice in choices}) == len({choice[-2:] == " ." for choice in choices}) == 1
        assert len({len(choice.split()) for choice in choices}) == 1
        assert max(map(len, choices)) - min(map(len, choices)) < 8
        assert all(choice[0] == " " and choice == choice.lower() and choice[-1] == "." for choice in choices)


def test_the_true_ending_is_neither_long_nor_first(items):
    """Guessing by place or by length is right as often as chance: 75 of 300, give or take three deviations of 7.5."""
    for guess in (*range(4), None):
        right = 0.0
        for item in items:
            lengths = [len(choice) for choice in item["choices"]]
            longest = [place for place in range(4) if lengths[place] == max(lengths)]
            guesses = longest if guess is None else [guess]
            right += (item["label"] in guesses) / len(guesses)
        assert right == pytest.approx(75, abs=23)


def test_the_ending_is_the_documents_own(items, documents):
    whole = " ".join(document.text for document in documents)
    for item in items:
        texts = [item["context"] + choice for choice in item["choices"]]
        assert [text in whole for text in texts] == [place == item["label"] for place in range(4)]
        assert 40 <= len(item["context"].split()) <= 90


def test_items_are_spread_and_more_begin_with_the_same(items, documents):
    owners = [next(document.id for document in documents if item["context"] in document.text) for item in items[:30]]
    assert len(set(owners)) == 30
    assert continuation_items(documents[::-1], 11) == items[:11]
    assert len({item["context"] for item in items}) == 300


def test_files_are_repeatable_and_beside_other_tasks(documents, items, tmp_path):
    (tmp_path / "cloze.yaml").write_text("task: cloze\n")
    file = write_continuation_task(documents, 7, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cloze.yaml", "continuation.jsonl", "continuation.yaml"]
    before = file.read_bytes(), file.with_suffix(".jsonl").read_bytes()
    assert [json.loads(line) for line in before[1].decode().splitlines()] == items[:7]
    write_continuation_task(documents, 7, tmp_path)
    assert (file.read_bytes(), file.with_suffix(".jsonl").read_bytes()) == before


def test_a_blank_stands_where_the_ending_is_missing(documents, items, tmp_path):
    file = write_continuation_task(documents, 3, tmp_path, blank="<extra_id_0>")
    rows = [json.loads(line) for line in file.with_suffix(".jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == [item["label"] for item in items[:3]]
    assert rows[0]["context"] == items[0]["context"] + " <extra_id_0>"
    assert rows[0]["choices"] == ["<extra_id_0>" + choice for choice in items[0]["choices"]]


def test_lm_eval_scores_each_choice_after_the_passage(documents, items, tmp_path, monkeypatch):
    """Each score is the log-likelihood of the ending alone, computed here from the logits."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM

    write_continuation_task(documents, 4, tmp_path / "tasks")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "model"))
    tokenizer = tiny_tokenizer()
    result = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu", max_length=512),
        tasks=["continuation"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )
    assert {"acc,none", "acc_norm,none"} <= set(result["results"]["continuation"])
    sample = result["samples"]["continuation"][0]
    assert sample["doc"] == items[0]
    assert [tuple(pair) for pair in sample["arguments"]] == [
        (items[0]["context"], choice) for choice in items[0]["choices"]
    ]
    expected = []
    for context, choice in sample["arguments"]:
        prompt, whole = (tokenizer(text, return_tensors="pt").input_ids for text in (context, context + choice))
        with torch.no_grad():
            logs = model(whole).logits.log_softmax(-1)[0]
        expected.append(sum(logs[i - 1, whole[0, i]].item() for i in range(prompt.shape[1], whole.shape[1])))
    assert [response[0] for response in sample["filtered_resps"]] == pytest.approx(expected, rel=1e-4)
    assert sample["acc"] == (max(range(4), key=lambda place: expected[place]) == items[0]["label"])
