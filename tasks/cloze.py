"""A last-word cloze task, after LAMBADA, made from documents that nothing was calibrated on.

An item is a passage of whole sentences without its final word. That word also occurs earlier in the passage, so that a
reader of the passage can guess it; it is a plain lower-case content word. The model is right when greedy decoding
gives exactly that word (lm-eval's `loglikelihood` accuracy); there is no list of choices, so chance is about zero.

A model that was trained to fill blanks is asked to fill one: the passage ends with the blank's token, and the answer
begins with it.

Source: Paperno et al. 2016, "The LAMBADA dataset" (arXiv 1606.06031).
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tasks.documents import Document
from tasks.lm_eval_task import write_task
from tasks.passages import order_key, passage, split_sentences, spread_items

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
    items = spread_items(
        documents,
        lambda document: _passages(document.text),
        lambda item: order_key(*item),
        count,
        "evaluation.cloze_items",
    )
    return [{"context": context, "target": target, "document": document} for (context, target), document in items]


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


def _passages(text: str) -> Iterator[tuple[str, str]]:
    """Yield (context, target) of passages that do not overlap."""
    sentences = split_sentences(text)
    begin = 0
    for end, sentence in enumerate(sentences):
        match = _FINAL_WORD.match(sentence)
        if not match or not _is_plain(match[2]):
            continue
        context = passage(sentences[begin:end], match[1])
        if context is not None and match[2] in re.findall(r"\w+", context):
            yield context, f" {match[2]}"
            begin = end + 1


def _is_plain(word: str) -> bool:
    return len(word) >= _TARGET_LETTERS and word not in _STOP_WORDS
