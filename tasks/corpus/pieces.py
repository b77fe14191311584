"""Cutting text that is too long for one document, and joining what is too short.

Cuts are chosen by the text around them, not by counting from its beginning (content-defined chunking). So two copies of
a book, one of which has another title page, are cut into the same pieces soon after it, and copies stay recognisable.

Source: Muthitacharoen et al. 2001, "A Low-bandwidth Network File System", 3.1.
"""

import itertools
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO

from tasks.corpus.documents import Document

LONGEST = 1 << 18
"""Characters of a document; longer ones are cut, for a tokenizer takes 90 bytes of memory a character."""
PIECE = 1 << 13
"""Characters of a piece, at most."""
_LEAST_PIECE = 1 << 11
_WANTED_PIECES = 200

# where to cut, the best first: between paragraphs, lines, sentences, words
_SEPARATORS = tuple(map(re.compile, (r"\n[ \t\r]*\n\s*", r"\n\s*", r"(?<=[.!?…]) +|(?<=[。！？．।])\s*", r"\s+")))
_CONTEXT = 32  # characters after a cut, whose checksum chooses it


@dataclass
class Cutting:
    """How long documents are cut, and which ones were."""

    longest: int = LONGEST
    size: int = PIECE
    cut: list[str] = field(default_factory=list)
    """Names of the documents."""

    def named(self, document: Document, parts: Iterable[str]) -> Iterator[Document]:
        """Yield a document's pieces as documents, or the document itself if there is one; its own text is not used."""
        numbered = enumerate(parts)
        first, second = next(numbered, (0, "")), next(numbered, None)
        if second is None:
            yield document._replace(text=first[1])
            return
        self.cut.append(document.id)
        for number, part in itertools.chain([first, second], numbered):
            yield document._replace(id=f"{document.id}:{number:05}", text=part)


def pieces(text: str, longest: int, size: int | None = None) -> list[str]:
    """Cut a text that is longer than `longest` into pieces of half of `size` (`longest`) to the whole of it.

    Returns:
        The pieces, which keep all but the white space between them; the text itself if it is short enough.
    """
    if len(text) <= longest:
        return [text]
    return list(_cut(text, lambda: "", size or longest))


def pieces_of_file(file: IO[str], cutting: Cutting) -> Iterator[str]:
    """Read a text file that may be of any length: whole if it is short enough, else in the same pieces.

    Not all of a long file is ever in memory.
    """
    held = file.read(cutting.longest + 1)
    if len(held) <= cutting.longest:
        yield held
    else:
        yield from _cut(held, lambda: file.read(cutting.longest), cutting.size)


def _cut(held: str, more: Callable[[], str], size: int) -> Iterator[str]:
    """Yield pieces of a text whose beginning is held; `more` gives what comes next, nothing at its end."""
    begin, ended = 0, False
    while True:
        left = len(held) - begin
        if left <= size + _CONTEXT and not ended:
            following = more()
            held, begin, ended = held[begin:] + following, 0, not following
        elif left > size:
            end, following_begin = _place(held, begin + size // 2, begin + size)
            if piece := held[begin:end].strip():
                yield piece
            begin = following_begin
        else:
            break
    if rest := held[begin:].strip():
        yield rest


def _place(text: str, low: int, high: int) -> tuple[int, int]:
    """Return where a piece ends and the next one begins, within [low, high]."""
    for separator in _SEPARATORS:
        places = [match.span() for match in separator.finditer(text, low, high)]
        if places:
            return min(places, key=lambda place: _checksum(text, place[1]))
    places = [(place, place) for place in range(low, high)]
    return min(places, key=lambda place: _checksum(text, place[1]))


def _checksum(text: str, place: int) -> int:
    return zlib.crc32(text[place : place + _CONTEXT].encode("utf-8", "surrogatepass"))


def piece_size(characters: int) -> int:
    """Return into which pieces so much text is cut, if it is few documents: some 200 of 2,048 to 8,192 characters."""
    return min(max(characters // _WANTED_PIECES, _LEAST_PIECE), PIECE)


def cut_documents(documents: Iterable[Document], cutting: Cutting) -> Iterator[Document]:
    """Cut documents that are too long; their pieces are named `name:00000`, `name:00001`, ..."""
    for document in documents:
        parts = pieces(document.text, cutting.longest, cutting.size)
        yield from cutting.named(document, parts)


def join_short(documents: Sequence[Document], length: Callable[[Document], int], least: int) -> list[Document]:
    """Join neighbours of one source until each document is long enough, a blank line between them.

    Args:
        documents: Of one split, in the corpus's order.
        length: Measures a document.
        least: Of what `length` measures. Longer documents stay as they are and end what is being joined.

    Returns:
        The documents; one of several is named after its first and the number of those that follow: `name+2`.
    """
    made: list[Document] = []
    for _, of_source in itertools.groupby(documents, key=lambda document: document.source):
        held: list[Document] = []
        total = 0
        for document in of_source:
            own = length(document)
            if own >= least:
                made += [*_joined(held), document]
                held, total = [], 0
                continue
            held.append(document)
            total += own
            if total >= least:
                made += _joined(held)
                held, total = [], 0
        made += _joined(held)
    return made


def _joined(documents: Sequence[Document]) -> list[Document]:
    if len(documents) < 2:
        return list(documents)
    first = documents[0]
    text = "\n\n".join(document.text for document in documents)
    return [first._replace(id=f"{first.id}+{len(documents) - 1}", text=text)]
