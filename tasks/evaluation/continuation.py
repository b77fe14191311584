"""A plausible-choices task, after HellaSwag, made from documents that nothing was calibrated on, without any model.

An item is a passage that breaks off within its last sentence, and four endings of it, one of which is the text's own.
The other three end other sentences of the same document, which are not in the passage. All four begin with the same
word, have as many words, are of the same length to within eight characters, hold nothing but lower-case words, commas
and the final stop, and come from the same draw: only the passage tells them apart. Chance is a quarter.

In other languages than English words may have capitals. Where words do not stand apart, endings are of 8 to 20
characters, as many in all four, and begin with the same one.

A model that was trained to fill blanks is asked to fill one: the passage ends with the blank's token, and every ending
begins with it.

Source: Zellers et al. 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?" (arXiv 1905.07830), whose wrong
endings a model writes; here they are real text, in the wrong place.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tasks.corpus.documents import Document
from tasks.corpus.writing import HAN, LETTER, SOUTHEAST_ASIAN, STOPS, Writing
from tasks.evaluation.lm_eval_task import write_task
from tasks.evaluation.passages import all_items, order_key, passage, spread_items

_TEMPLATE = "continuation.yaml"
CHOICES = 4

_ENDING_WORDS = range(6, 13)
_BEGINNING_WORDS = 4  # of the broken sentence, at least
_LENGTH_STEP = 8  # characters
# plain words and commas, and the stop (with WikiText's spaces before them): no capital, digit or quote to go by
_ENDING = re.compile(r"[a-z]+(?: ?,| [a-z]+)+( ?\.)")
# any language with words apart
_ANY_ENDING = re.compile(rf"{LETTER}+(?: ?[,،]| {LETTER}+)+( ?[{STOPS}])")
_UNSPACED_CHARACTERS = range(8, 21)
_UNSPACED_BEGINNING = 6
_UNSPACED_ENDING = re.compile(f"[{HAN}\u3041-\u30fa\u30fc{SOUTHEAST_ASIAN}、，]+([。！？]?)")


class _Ending(NamedTuple):
    """The rest of a sentence."""

    sentence: int
    beginning: str
    text: str
    kind: tuple[str, str, int, int]
    """First word, stop, words, length: endings of one kind can stand for each other."""


def continuation_items(documents: Sequence[Document], count: int) -> list[dict[str, Any]]:
    """Make items, spread over the documents; the first n are the same for every larger count.

    Args:
        documents: Held-out documents.
        count: Number of items.

    Returns:
        {"context", "choices", "label", "document"} an item; the label is the true ending's place among the choices,
        each of which begins with the space that separates it, and items of one document are no independent witnesses.

    Raises:
        InputError: If the documents do not hold that many.
    """
    items = spread_items(
        documents,
        lambda document: _items(document.text),
        lambda item: order_key(item["context"], *item["choices"]),
        count,
        "evaluation.continuation_items",
    )
    return [item | {"document": document} for item, document in items]


def count_continuation_items(documents: Sequence[Document]) -> int:
    """Return how many items documents hold."""
    return len(
        all_items(
            documents,
            lambda document: _items(document.text),
            lambda item: order_key(item["context"], *item["choices"]),
        )
    )


def write_continuation_task(
    documents: Sequence[Document], count: int, directory: Path, blank: str | None = None
) -> Path:
    """Write the items and the lm-eval task `continuation` into a directory.

    Args:
        documents: Held-out documents.
        count: Number of items.
        directory: Made if need be.
        blank: Token that stands for what is missing, if the model knows one.

    Returns:
        The task's YAML file.

    Raises:
        InputError: If the documents do not hold that many items.
    """
    items = continuation_items(documents, count)
    if blank is not None:
        items = [
            item | {"context": f"{item['context']} {blank}", "choices": [blank + choice for choice in item["choices"]]}
            for item in items
        ]
    return write_task(_TEMPLATE, items, directory)


def _items(text: str) -> Iterator[dict[str, Any]]:
    """Yield the items of a document; their passages do not overlap."""
    writing = Writing.of(text)
    sentences = writing.sentences(text)
    made = _endings if writing.spaced else _unspaced_endings
    of_sentence = [list(made(number, sentence, writing)) for number, sentence in enumerate(sentences)]
    of_kind: dict[tuple[str, str, int, int], list[_Ending]] = defaultdict(list)
    for endings in of_sentence:
        for ending in endings:
            of_kind[ending.kind].append(ending)
    begin = 0
    for end in range(len(sentences)):
        item = _item(sentences, begin, of_sentence[end], of_kind, writing)
        if item is not None:
            yield item
            begin = end + 1


def _endings(number: int, sentence: str, writing: Writing) -> Iterator[_Ending]:
    """Yield every ending of a sentence that could be a choice."""
    allowed = _ENDING if writing is Writing.ENGLISH else _ANY_ENDING
    words = sentence.split(" ")
    for count in _ENDING_WORDS:
        beginning, text = words[:-count], " ".join(words[-count:])
        match = allowed.fullmatch(text)
        if len(beginning) >= _BEGINNING_WORDS and match:
            kind = (words[-count], match[1], count, len(text) // _LENGTH_STEP)
            yield _Ending(number, " ".join(beginning), text, kind)


def _unspaced_endings(number: int, sentence: str, writing: Writing) -> Iterator[_Ending]:
    for count in _UNSPACED_CHARACTERS:
        beginning, text = sentence[:-count], sentence[-count:]
        match = _UNSPACED_ENDING.fullmatch(text)
        if len(beginning) >= _UNSPACED_BEGINNING and match and text[0].isalpha():
            yield _Ending(number, beginning, text, (text[0], match[1], count, 0))


def _item(
    sentences: Sequence[str],
    begin: int,
    endings: Sequence[_Ending],
    of_kind: Mapping[tuple[str, str, int, int], Sequence[_Ending]],
    writing: Writing,
) -> dict[str, Any] | None:
    """Return an item of one sentence's endings, the first in hash order that has a passage and three rivals."""
    for true in sorted(endings, key=lambda ending: order_key(ending.beginning, ending.text)):
        context = passage(sentences[begin : true.sentence], true.beginning, writing)
        if context is None:
            continue
        rivals = {true.text: true.sentence}
        for other in sorted(of_kind[true.kind], key=lambda other: order_key(context, other.text)):
            shown = sentences[other.sentence] in context or other.sentence in rivals.values()
            if not shown and other.text not in rivals:
                rivals[other.text] = other.sentence
            if len(rivals) == CHOICES:
                choices = sorted(rivals, key=lambda text: order_key("place", context, text))
                return {
                    "context": context,
                    "choices": [f" {text}" if writing.spaced else text for text in choices],
                    "label": choices.index(true.text),
                }
    return None
