"""Sentences and items of other languages than English."""

import json
import random

import pytest

from nirvana.errors import InputError
from tasks.corpus.documents import Document
from tasks.corpus.writing import Writing, is_word
from tasks.evaluation.cloze import cloze_items, count_cloze_items, write_cloze_task
from tasks.evaluation.continuation import continuation_items, count_continuation_items

NOUNS = {
    "zh": ["农民", "铁路", "政府", "河流", "学校", "市场", "法律", "军队"],
    "ja": ["農民", "鉄道", "政府", "学校", "市場", "バス", "ホテル"],
    "th": ["ชาวนา", "รถไฟ", "รัฐบาล", "โรงเรียน", "ตลาด", "กฎหมาย"],
    "de": ["Bauern", "Eisenbahn", "Regierung", "Schule", "Märkte", "Häfen"],
    "ru": ["крестьяне", "правительство", "рынок", "закон", "армия", "гавань"],
    "ko": ["농부가", "철도를", "정부가", "학교를", "시장을"],
    "ar": ["المزارع", "القطار", "الحكومة", "النهر", "المدرسة"],
}
SENTENCES = {
    "zh": "{}在{}旁边修建了{}，然后保护{}。",
    "ja": "{}は{}の近くで{}のために{}を作った。",
    "th": "{}สร้าง{}ใกล้กับ{}และ{} ",
    "de": "Die {} und die {} brauchen in diesem Jahr die {} und auch die {}. ",
    "ru": "Эти {} и {} строят новые {} и старые {}. ",
    "ko": "{} {} 오래된 {} {}. ",
    "ar": "يبني {} قرب {} الكبير مع {} و {}. ",
}


def documents_of(language, count=60, sentences=40):
    generator = random.Random(0)
    made = []
    for number in range(count):
        parts = (SENTENCES[language].format(*generator.choices(NOUNS[language], k=4)) for _ in range(sentences))
        made.append(Document(f"d{number}", "".join(parts).strip()))
    return made


@pytest.mark.parametrize("language", SENTENCES)
def test_every_language_gives_items(language):
    documents = documents_of(language)
    items = cloze_items(documents, 200)
    text = {document.id: document.text for document in documents}
    for item in items:
        assert item["target"].strip() in item["context"]
        assert item["context"] + item["target"] in text[item["document"]]
        assert 20 <= len(item["context"]) <= 700
    assert count_cloze_items(documents) >= 200
    assert cloze_items(documents, 50) == items[:50]


def test_targets_by_hand():
    german = (
        "Die Bauern des Tales baten um eine Eisenbahn, und viele lange Jahre kam keine Antwort aus der Hauptstadt. "
        "Im Frühling wurde eine Kommission geschickt, die das Land vermessen sollte, z. B. am Fluss und in den Bergen. "
        "Sie berichtete am Ende, nichts diene dem Tal und seinen Leuten mehr als die große "
    )
    (item,) = cloze_items([Document("a", german + "Eisenbahn.")], 1)
    assert item["target"] == " Eisenbahn"
    assert item["context"] == german.strip()
    chinese = (
        "山谷里的农民要求修建一条铁路，可是过了十年首都也没有任何答复。" * 2 + "委员会报告说，对山谷最有用的就是铁路。"
    )
    (item,) = cloze_items([Document("a", chinese)], 1)
    assert item == {"context": chinese[:-3], "target": "铁路", "document": "a"}
    japanese = (
        "谷の農民は鉄道を求めたが、長い年月のあいだ首都からの返事はなかった。" * 2
        + "委員会は谷に必要なのは鉄道だと報告した。"
    )
    targets = [item["target"] for item in cloze_items([Document("a", japanese)], 1)]
    assert targets == ["鉄道"]


def test_frequent_words_of_a_larger_text_are_not_asked_for():
    generator = random.Random(1)
    rare = ["".join(generator.choices("abcdefgh", k=7)) for _ in range(3000)]
    texts = []
    for _ in range(40):
        words = [generator.choice(rare) for _ in range(400)]
        sentences = (" ".join(["Wort", *words[at : at + 12], "worden"]) + "." for at in range(0, 400, 12))
        texts.append(" ".join(sentences))
    with pytest.raises(InputError, match="hold 0"):
        cloze_items([Document(f"d{number}", text) for number, text in enumerate(texts)], 1)


def test_continuations():
    for language in ("zh", "de"):
        documents = documents_of(language)
        for item in continuation_items(documents, 40):
            choices = item["choices"]
            assert len(set(choices)) == 4
            text = next(each.text for each in documents if each.id == item["document"])
            assert item["context"] + choices[item["label"]] in text
            assert len({len(choice.split()) for choice in choices}) == 1
            assert len({choice.strip()[0] for choice in choices}) == 1
        assert count_continuation_items(documents) >= 40


def test_too_few_items_say_what_to_use_instead():
    with pytest.raises(
        InputError, match=r"hold 0; lower it, .* leave cloze out of evaluation\.tasks \(\[\]: perplexity"
    ):
        cloze_items([Document("a", "0 1 2 3 4 5")], 1)
    with pytest.raises(InputError, match=r"leave continuation out of evaluation\.tasks"):
        continuation_items([Document("a", "")], 1)


@pytest.mark.parametrize(
    ("text", "writing", "sentences"),
    [
        ("The law of the land. It stands.", Writing.ENGLISH, ["The law of the land.", "It stands."]),
        ("Größe zählt. Über uns z. B. nichts. ja", Writing.SPACED, ["Größe zählt.", "Über uns z. B. nichts. ja"]),
        ("他来了。“好！”她说\n道。完", Writing.CHINESE_OR_JAPANESE, ["他来了。", "“好！”", "她说道。", "完"]),
        ("สวัสดี ชาวนา", Writing.SOUTHEAST_ASIAN, ["สวัสดี", "ชาวนา"]),
        ("यह घर है। वह घर था।", Writing.SPACED, ["यह घर है।", "वह घर था।"]),
    ],
)
def test_how_a_text_is_written(text, writing, sentences):
    assert Writing.of(text) is writing
    assert writing.sentences(text) == sentences


def test_words_are_letters_with_their_marks():
    assert [is_word(text) for text in ("Größe", "है", "a-b", "b2", "", "ः")] == [True, True, False, False, False, False]


def test_a_target_within_chinese_is_scored_whole(tmp_path):
    """A token that goes over the end of the context must not swallow the target's beginning."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from tasks.evaluation.lm_eval_model import ContinuationLM

    pieces = ["修", "建", "铁", "路", "建铁", "建铁路", "[UNK]"]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: place for place, piece in enumerate(pieces)}, [("建", "铁"), ("建铁", "路")], unk_token="[UNK]"
        )
    )
    model = ContinuationLM.__new__(ContinuationLM)
    model.backend = "causal"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    model.tok_encode = lambda text, **_: fast(text, add_special_tokens=False)["input_ids"]
    assert model._encode_pair("修建", "铁路") == ([0, 1], [2, 3])  # together they are 修 建铁路
    assert model._encode_pair("修", "铁路") == ([0], [2, 3])
    documents = documents_of("zh")
    write_cloze_task(documents, 3, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "cloze.jsonl").read_text().splitlines()]
    assert rows == cloze_items(documents, 3)
