"""Last-word items: what makes one, how they are spread, and that lm-eval finds the task."""

import json

import pytest
from tiny import tiny_llama, tiny_tokenizer

from nirvana.errors import InputError
from tasks.corpus.documents import Document
from tasks.evaluation.cloze import cloze_items, write_cloze_task

# 42 words before the last one
PASSAGE = (
    "The farmers of the valley asked for a railway, and for ten long years no answer came to them from the capital. "
    "In the spring a commission was sent out to measure the land. "
    "It reported that nothing would serve the valley better than a "
)


def document(name, ending, before=PASSAGE):
    return Document(name, before + ending)


def test_item_by_hand():
    expected = {"context": PASSAGE.strip(), "target": " railway", "document": "a"}
    assert cloze_items([document("a", "railway.")], 1) == [expected]
    assert cloze_items([document("a", "railway.")._replace(source=1)], 1) == [expected | {"document": "1:a"}]


@pytest.mark.parametrize(
    "ending",
    [
        "harbor.",  # not in the passage
        "land, railway",  # no end of a sentence
        "Railway.",  # not lower-case
        "ten.",  # short
        "answer them.",  # a stop word
        "railway-land.",  # not one plain word
        "1905.",
    ],
)
def test_endings_that_make_no_item(ending):
    with pytest.raises(InputError, match="hold 0"):
        cloze_items([document("a", ending)], 1)


def test_sources_give_an_item_each_in_turn():
    documents = [document(f"a{number}", "railway.") for number in range(6)]
    documents += [document(f"b{number}", "commission.")._replace(source=1) for number in range(2)]
    targets = [item["target"] for item in cloze_items(documents, 6)]
    assert targets == [" railway", " commission"] * 2 + [" railway"] * 2


def test_context_is_neither_short_nor_long():
    short = "The valley wanted a railway. It was given the railway."
    long = "The railway " + "and the railway " * 60 + "came to nothing but another railway."
    for text in (short, long):
        with pytest.raises(InputError, match="hold 0"):
            cloze_items([Document("a", text)], 1)


def test_a_long_text_is_cut_to_the_sentences_before_the_word():
    text = "This sentence is far away. " * 30 + PASSAGE + "railway."
    (item,) = cloze_items([Document("a", text)], 1)
    assert item["context"] == PASSAGE.strip()


def test_a_space_before_the_stop_is_no_obstacle():
    """As WikiText has it."""
    spaced = PASSAGE.replace(".", " .").replace(",", " ,").strip()
    (item,) = cloze_items([Document("a", f"{spaced} railway .")], 1)
    assert item == {"context": spaced, "target": " railway", "document": "a"}


def test_line_breaks_become_spaces():
    text = PASSAGE.replace(". ", ".\n\n") + "railway."
    assert cloze_items([Document("a", text)], 1) == cloze_items([document("a", "railway.")], 1)


@pytest.fixture
def documents():
    return [
        Document(
            f"d{i}", " ".join(PASSAGE.replace("valley", f"valley of number{i}x{j}") + "railway." for j in range(5))
        )
        for i in range(8)
    ]


def test_items_are_spread_over_documents(documents):
    items = cloze_items(documents, 8)
    assert len({item["context"].split("number")[1].split("x")[0] for item in items}) == 8


def test_more_items_begin_with_the_same(documents):
    everything = cloze_items(documents, 40)
    assert cloze_items(documents, 11) == everything[:11]
    assert cloze_items(documents[::-1], 40) == everything
    assert len({item["context"] for item in everything}) == 40


def test_too_many_says_how_many_there_are(documents):
    with pytest.raises(InputError, match="expected 41 items, the 8 evaluation documents hold 40; lower it"):
        cloze_items(documents, 41)


def test_files_are_repeatable(documents, tmp_path):
    one, two = write_cloze_task(documents, 7, tmp_path / "one"), write_cloze_task(documents, 7, tmp_path / "two")
    assert (tmp_path / "one/cloze.jsonl").read_bytes() == (tmp_path / "two/cloze.jsonl").read_bytes()
    assert one.read_text().replace("/one/", "/two/") == two.read_text()
    rows = [json.loads(line) for line in (tmp_path / "one/cloze.jsonl").read_text().splitlines()]
    assert rows == cloze_items(documents, 7)


def test_a_blank_stands_where_the_word_is_missing(documents, tmp_path):
    plain = cloze_items(documents, 3)
    write_cloze_task(documents, 3, tmp_path, blank="<extra_id_0>")
    rows = [json.loads(line) for line in (tmp_path / "cloze.jsonl").read_text().splitlines()]
    assert rows == [
        item | {"context": item["context"] + " <extra_id_0>", "target": "<extra_id_0>" + item["target"]}
        for item in plain
    ]


def test_lm_eval_finds_and_scores_the_task(documents, tmp_path, monkeypatch):
    """A quote and a dollar sign in the path must survive the template."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM

    directory = tmp_path / 'a "quoted" $place'
    write_cloze_task(documents, 6, directory)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "model"))
    tokenizer = tiny_tokenizer()
    result = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu", max_length=256),
        tasks=["cloze"],
        task_manager=TaskManager(include_path=str(directory), include_defaults=False),
        bootstrap_iters=0,
    )
    assert result["results"]["cloze"]["sample_len"] == 6
    assert 0 <= result["results"]["cloze"]["acc,none"] <= 1
    sample = result["samples"]["cloze"][0]
    context, target = sample["arguments"][0]
    assert {"context": context, "target": target, "document": sample["doc"]["document"]} == sample["doc"]
    # the score is the log-likelihood of the last word alone, computed here from the logits
    prompt, whole = (tokenizer(text, return_tensors="pt").input_ids for text in (context, context + target))
    with torch.no_grad():
        logs = model(whole).logits.log_softmax(-1)[0]
    expected = sum(logs[i - 1, whole[0, i]].item() for i in range(prompt.shape[1], whole.shape[1]))
    assert sample["filtered_resps"][0][0] == pytest.approx(expected, rel=1e-4)
