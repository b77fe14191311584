"""A last-word cloze task, after LAMBADA, made from documents that nothing was calibrated on.

An item is a passage of whole sentences without its final word. That word also occurs earlier in the passage, so that a
reader of the passage can guess it; it is a plain lower-case content word. The model is right when greedy decoding
gives exactly that word (lm-eval's `loglikelihood` accuracy); there is no list of choices, so chance is about zero.

In other languages than English no list of function words is known. Where words stand apart, the last word may have a
capital and must not be one of the hundred most frequent of a larger text. Where they do not, the passage breaks off
before two to four characters of Chinese, a word in katakana, or three to twelve characters of Thai, Lao, Burmese or
Khmer that end a stretch of such letters and occur earlier: the last such stretch of a sentence. That measures whether
the model goes on with something it has read, not always with a whole word.

A model that was trained to fill blanks is asked to fill one: the passage ends with the blank's token, and the answer
begins with it.

Source: Paperno et al. 2016, "The LAMBADA dataset" (arXiv 1606.06031).
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tasks.corpus.documents import Document
from tasks.corpus.writing import HAN, KATAKANA, LETTER, SOUTHEAST_ASIAN, STOPS, Writing, is_word
from tasks.evaluation.lm_eval_task import write_task
from tasks.evaluation.passages import all_items, order_key, passage, spread_items

_TEMPLATE = "cloze.yaml"

_TARGET_LETTERS = 4
# function words, and numbers that their "per" or "of dollars" gives away
_FUNCTION_WORDS = """
about above abroad after again against ahead alike alone along already also although always among another
anymore anyone anything anywhere around aside away back because been before behind being below best
better between beyond billion billions both cannot capita cent cents come could does doing done down
during each either else elsewhere enough even ever every everybody everyone everything everywhere except
first forth forward from further given have having hence here hereafter hereby herein hereof heretofore
hers herself himself hitherto however hundred hundreds indeed instead into itself just less like likewise
made make many meanwhile million millions mine more moreover most much must myself nearly never
nevertheless next nobody none nonetheless nothing nowhere once only onto other others otherwise ours
ourselves over part perhaps quite rather said same shall should since some somebody someone something
somewhere soon still such than that their theirs them themselves then there thereafter thereby therefore
therefrom therein thereof thereon thereto therewith these they thing things this those though thousand
thousands through throughout thus today together tomorrow toward towards under until unto upon very want
well were what whatever when whence where whereby wherein whether which while whole whom whose will with
within without would year years your yours yourself
"""
_STOP_WORDS = frozenset(_FUNCTION_WORDS.split())
# WikiText has a space before the stop
_FINAL_WORD = re.compile(r"^(.*\S) ([a-z]+) ?[.!?]$")
# any language with words apart
_LAST_WORD = re.compile(rf"^(.*\S) ({LETTER}+) ?[{STOPS}]+[\"'»”’)]*$")
_WORD = re.compile(rf"{LETTER}+")
_CASELESS_LETTERS = 2  # a syllable is a letter in Korean, and vowels are no letters in Arabic
_FREQUENT_WORDS = 100
_LARGER_TEXT = 2000  # different words
# without spaces: stretches of one script, and how much of their ends may be asked for
_STRETCHES = re.compile(f"(?P<han>[{HAN}]{{2,}})|(?P<katakana>[{KATAKANA}]{{2,}})|(?P<other>[{SOUTHEAST_ASIAN}]{{3,}})")
_HAN_TARGETS = range(4, 1, -1)
_OTHER_TARGETS = range(12, 2, -1)
_LAST_STRETCHES = 3
_THAI_FOLLOWING_VOWELS = "ะาำๅ"  # letters to Unicode, but nothing begins with them


def cloze_items(documents: Sequence[Document], count: int) -> list[dict[str, str]]:
    """Make items, spread over the documents; the first n are the same for every larger count.

    Args:
        documents: Held-out documents.
        count: Number of items.

    Returns:
        {"context", "target", "document"} an item; the target begins with the space that separates it, and items of
        one document are no independent witnesses.

    Raises:
        InputError: If the documents do not hold that many.
    """
    frequent = _frequent_words(documents)
    items = spread_items(
        documents,
        lambda document: _passages(document.text, frequent),
        lambda item: order_key(*item),
        count,
        "evaluation.cloze_items",
    )
    return [{"context": context, "target": target, "document": document} for (context, target), document in items]


def check_cloze_items(documents: Sequence[Document], count: int) -> None:
    """Check that documents hold so many items, reading no further than it takes.

    Raises:
        InputError: If they do not.
    """
    frequent = _frequent_words(documents)  # of all: what a part of them gives, all of them may not
    found = 0
    for document in documents:
        found += sum(1 for _ in _passages(document.text, frequent))
        if found >= count:
            return
    cloze_items(documents, count)


def count_cloze_items(documents: Sequence[Document]) -> int:
    """Return how many items documents hold."""
    frequent = _frequent_words(documents)
    return len(all_items(documents, lambda each: _passages(each.text, frequent), lambda item: order_key(*item)))


def write_cloze_task(documents: Sequence[Document], count: int, directory: Path, blank: str | None = None) -> Path:
    """Write the items and the lm-eval task `cloze` into a directory.

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
    items = cloze_items(documents, count)
    if blank is not None:
        items = [
            item | {"context": f"{item['context']} {blank}", "target": f"{blank}{item['target']}"} for item in items
        ]
    return write_task(_TEMPLATE, items, directory)


def _frequent_words(documents: Sequence[Document]) -> frozenset[str]:
    """Return the most frequent words of a larger text in other languages than English: mostly function words."""
    counts: Counter[str] = Counter()
    for document in documents:
        if Writing.of(document.text) is Writing.SPACED:
            counts.update(_WORD.findall(document.text))
    if len(counts) < _LARGER_TEXT:
        return frozenset()
    return frozenset(sorted(counts, key=lambda word: (-counts[word], word))[:_FREQUENT_WORDS])


def _passages(text: str, frequent: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Yield (context, target) of passages that do not overlap."""
    writing = Writing.of(text)
    sentences = writing.sentences(text)
    begin = 0
    for end, sentence in enumerate(sentences):
        for beginning, target in _endings(sentence, writing, frequent):
            context = passage(sentences[begin:end], beginning, writing)
            if context is None:
                continue
            if writing.spaced:
                words = re.findall(r"\w+", context) if writing is Writing.ENGLISH else _WORD.findall(context)
                known = target in words
            else:
                known = target in context
            if known:
                yield context, f" {target}" if writing.spaced else target
                begin = end + 1
                break


def _endings(sentence: str, writing: Writing, frequent: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Yield the ways in which a sentence can break off before what is asked for, the preferred one first."""
    if writing is Writing.ENGLISH:
        match = _FINAL_WORD.match(sentence)
        if match and _is_plain(match[2]):
            yield match[1], match[2]
    elif writing.spaced:
        match = _LAST_WORD.match(sentence)
        if match and _is_long(match[2]) and match[2] not in frequent:
            yield match[1], match[2]
    else:
        for stretch in list(_STRETCHES.finditer(sentence))[: -_LAST_STRETCHES - 1 : -1]:
            for length in _lengths(stretch):
                begin = stretch.end() - length
                if begin > 0 and sentence[begin].isalpha() and sentence[begin] not in _THAI_FOLLOWING_VOWELS:
                    yield sentence[:begin].rstrip(), sentence[begin : stretch.end()]


def _lengths(stretch: re.Match[str]) -> Sequence[int]:
    longest = len(stretch[0])
    if stretch["katakana"]:
        return [longest]
    return [length for length in (_HAN_TARGETS if stretch["han"] else _OTHER_TARGETS) if length <= longest]


def _is_long(word: str) -> bool:
    cased = word.lower() != word.upper()
    return is_word(word) and len(word) >= (_TARGET_LETTERS if cased else _CASELESS_LETTERS)


def _is_plain(word: str) -> bool:
    return len(word) >= _TARGET_LETTERS and word not in _STOP_WORDS
