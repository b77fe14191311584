"""Passages of whole sentences from held-out documents, and the spreading of items over the documents."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from nirvana.errors import InputError
from tasks.corpus.documents import Document, in_turn
from tasks.corpus.writing import Writing

Item = TypeVar("Item")

_LEAST_WORDS = 40  # whole sentences, so up to one sentence more
_MOST_WORDS = 90


def passage(before: Sequence[str], beginning: str, writing: Writing = Writing.ENGLISH) -> str | None:
    """Return the passage of 40 to 90 words that ends with the beginning of a sentence.

    Args:
        before: Sentences that may precede it, in the text's order; at least one is taken.
        beginning: The sentence as far as it is shown.
        writing: What counts as a word, and what stands between sentences.

    Returns:
        The shortest such passage of whole sentences; None if it would be too long or the text begins too late.
    """
    first, words = len(before), writing.words(beginning)
    while words < _LEAST_WORDS and first > 0:
        first -= 1
        words += writing.words(before[first])
    if first == len(before) or not _LEAST_WORDS <= words <= _MOST_WORDS:
        return None
    return writing.joint.join([*before[first:], beginning])


def spread_items(
    documents: Sequence[Document],
    make_items: Callable[[Document], Iterable[Item]],
    key: Callable[[Item], bytes],
    count: int,
    parameter: str,
) -> list[tuple[Item, str]]:
    """Make items, spread over the documents, the sources in turn; the first n are the same for every larger count.

    Args:
        documents: Held-out documents, in any order.
        make_items: Makes all items of a document.
        key: Orders the items of a document.
        count: Number of items.
        parameter: What that number is called in params.yaml.

    Returns:
        Each item with the name of its document.

    Raises:
        InputError: If the documents do not hold that many.
    """
    items = all_items(documents, make_items, key)
    if len(items) < count:
        task = parameter.removeprefix("evaluation.").removesuffix("_items")
        raise InputError(
            f"{parameter}: expected {count} items, the {len(documents)} evaluation documents hold {len(items)}; lower "
            f"it, use a larger corpus (corpus.source, corpus.max_documents) of running text, or leave {task} out of "
            "evaluation.tasks ([]: perplexity alone)"
        )
    return items[:count]


def all_items(
    documents: Sequence[Document], make_items: Callable[[Document], Iterable[Item]], key: Callable[[Item], bytes]
) -> list[tuple[Item, str]]:
    """Make all items that documents hold, in the order of `spread_items`."""

    def spread(of_source: Sequence[Document]) -> Iterator[tuple[Item, str]]:
        shuffled = sorted(of_source, key=lambda document: order_key(document.id))
        queues = [[(item, _name(document)) for item in sorted(make_items(document), key=key)] for document in shuffled]
        rounds = max(map(len, queues), default=0)
        # one item of each document, then a second of each, ...
        yield from (queue[turn] for turn in range(rounds) for queue in queues if turn < len(queue))

    return list(in_turn(documents, spread))


def _name(document: Document) -> str:
    """Return a document's name; one source may use another's ids."""
    return f"{document.source}:{document.id}" if document.source else document.id


def order_key(*parts: Any) -> bytes:
    """Return what puts things in an order that is random, yet the same everywhere."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
