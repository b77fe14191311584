"""Copies under other names: equal but for case and spaces, or most of one in the other."""

import random

import pytest

from tasks.corpus.copies import groups_of_copies, normalised
from tasks.corpus.documents import Document


def text_of(seed, words=600, letters="abcdefgh"):
    generator = random.Random(seed)
    return " ".join("".join(generator.choices(letters, k=4)) for _ in range(words))


def groups(*texts):
    return groups_of_copies([Document(f"d{number}", text) for number, text in enumerate(texts)])


def test_equal_but_for_case_spaces_and_compatibility_forms():
    assert normalised(" Ｆｉｎｅ\n\tSTRASSE ") == normalised("fine straße")
    assert groups("One text of words.", "another text", "one  TEXT of\nwords. ") == [0, 1, 0]
    assert groups("yes", "yes", "") == [0, 1, 2]  # too short to be a copy


@pytest.mark.parametrize(
    "changed",
    [
        lambda text: "A title page. By another hand.\n\n" + text,
        lambda text: text[: len(text) * 9 // 10] + " and an end of its own",
        lambda text: text[len(text) // 3 : len(text) * 2 // 3],  # a part
        lambda text: text.replace("a", "A", 9),
        lambda text: text + " " + text_of(9, 3000),  # a collection
    ],
)
def test_most_of_one_in_the_other(changed):
    text = text_of(1)
    assert groups(text_of(0), text, text_of(2), changed(text)) == [0, 1, 2, 1]


def test_chinese_has_its_characters_for_words():
    text = text_of(1, letters="农民铁路政府河流学校").replace(" ", "")
    other = text_of(2, letters="农民铁路政府河流学校").replace(" ", "")
    assert groups(text, other, "前言。" + text) == [0, 1, 0]


def test_a_half_is_no_copy_and_common_phrases_make_none():
    phrase = text_of(5, 60)
    texts = [f"{text_of(seed, 200)} {phrase} {text_of(seed + 50, 200)}" for seed in range(40)]
    assert groups(*texts) == list(range(40))
    half = text_of(1)[:1500]
    assert groups(half + text_of(2), half + text_of(3)) == [0, 1]


def test_copies_of_copies_are_in_one_group():
    text = text_of(1, 1000)
    quarter = len(text) // 10
    chain = [text, text[quarter:] + text_of(7, 60), text[2 * quarter :] + text_of(7, 60) + text_of(8, 60)]
    assert groups(*chain) == [0, 0, 0]
    assert groups(*([text] * 60), text_of(2)) == [0] * 60 + [60]
