"""Zero-shot items from raw text that nothing was calibrated on: last words and plausible continuations.

A document that shares a run of thirteen words with the calibration or compensation text is left out whole: what
stands around a calibration sequence is no news either.

Source of the thirteen: Brown et al. 2020 (arXiv 2005.14165), appendix C, who clean their benchmarks so.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nirvana.errors import InputError
from studies.comparison import Texts
from studies.texts import read_text
from tasks.corpus.documents import Document, read_documents
from tasks.evaluation.cloze import cloze_items
from tasks.evaluation.continuation import continuation_items
from tasks.sample_pool import split_documents
from tasks.sources.model_directory import load_tokenizer

Items = Sequence[Mapping[str, Any]]
LAST_WORD, CONTINUATION = "last word", "continuation"
CORPUS, OTHER = "corpus", "text"
"""What the pipeline's text is called; another takes its file's name, or this where it would be the same."""
RUN = 13
"""Words in a row that two texts do not share by chance."""
_LAST_WORD_SHARE = 0.6
"""One costs a quarter of four endings, and tells more of a model than they do."""
_HELD = re.compile(r"documents hold (\d+);")
"""What tasks.evaluation.passages says of a text that is too short."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ItemSet:
    """Items of one kind from one text."""

    text: str
    kind: str
    items: Items

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the items."""
        return hashlib.sha256(json.dumps([dict(item) for item in self.items], sort_keys=True).encode()).hexdigest()


def item_sets(model_directory: Path, texts: Texts, corpus: Path, count: int, text: Path | None = None) -> list[ItemSet]:
    """Make `count` items of the corpus's evaluation split and, if given, as many of another text.

    Args:
        model_directory: The dense model, whose tokenizer wrote the ids of `texts`.
        texts: What is calibrated on and compensated on: no item comes from a document that shares words with it.
        corpus: The directory that fetch_corpus writes.
        count: Items a text, three fifths of them last words where it holds so many of both kinds.
        text: A file of text, of JSON rows with a column `text`, or a directory of such.

    Raises:
        InputError: If there is no such text, or it holds too few items.
    """
    seen = calibration_runs(load_tokenizer(model_directory), texts)
    sources = {CORPUS: split_documents(read_documents(corpus / "documents.jsonl"))["evaluation"]}
    if text is not None:
        sources[text.stem if text.stem != CORPUS else OTHER] = read_text(text, "--text")
    return [each for name, documents in sources.items() for each in _made(name, documents, seen, count)]


def calibration_runs(tokenizer: Any, texts: Texts) -> set[str]:
    """Return the runs of words in what is calibrated on and compensated on."""
    rows = (row for text in (texts.calibration, texts.compensation) for row in text.ids.tolist())
    return {run for row in rows for run in _runs(tokenizer.decode(row, skip_special_tokens=True))}


def _runs(text: str) -> Iterator[str]:
    words = re.findall(r"\w+", text.lower())
    return (" ".join(words[start : start + RUN]) for start in range(len(words) - RUN + 1))


def _made(name: str, documents: Sequence[Document], seen: set[str], count: int) -> Iterator[ItemSet]:
    apart = [document for document in documents if seen.isdisjoint(_runs(document.text))]
    shared = len(documents) - len(apart)
    if shared:
        _LOG.info("%s: %d of %d documents left out, they share text with calibration", name, shared, len(documents))
    words = _as_many(cloze_items, apart, round(_LAST_WORD_SHARE * count))
    endings = _as_many(continuation_items, apart, count - len(words))
    if len(words) + len(endings) < count:
        words = _as_many(cloze_items, apart, count - len(endings))
    if len(words) + len(endings) < count:
        raise InputError(
            f"--items: expected {count} items from {name}, its {len(apart)} documents hold {len(words)} last words and "
            f"{len(endings)} continuations{f'; {shared} more share text with calibration' if shared else ''}; lower "
            "--items or give more text, a document a line of a .jsonl file"
        )
    yield from (ItemSet(name, kind, items) for kind, items in ((LAST_WORD, words), (CONTINUATION, endings)) if items)


def _as_many(make: Callable[[Sequence[Document], int], Items], documents: Sequence[Document], count: int) -> Items:
    """Return up to `count` items, as many as there is text for."""
    try:
        return make(documents, count)
    except InputError as error:
        # to count them is to make them all, which it has just done
        held = _HELD.search(str(error))
        if held is None:
            raise
        return make(documents, int(held[1]))


def blocks(items: Items, size: int) -> Iterable[Items]:
    """Return the items, so many at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))
