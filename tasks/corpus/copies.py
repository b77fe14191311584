"""Which documents are copies of one another, so that none is in calibration and evaluation under two names.

Copies are documents with the same text but for case, white space and Unicode compatibility forms (NFKC), and documents
of which one holds four fifths of what the other says: of its runs of eight words (shingles), sampled by their hash. So
another title page, a footer or a correction hides nothing. What is not found: a text told in other words, a
translation, texts that share less, and a text of under some hundred words that differs in more than case and spaces.

Source: Broder 1997, "On the resemblance and containment of documents".
"""

import hashlib
import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from tasks.corpus.documents import Document

_WORDS_A_SHINGLE = 8
_CONTAINED = 0.8
_SAMPLED = 4  # one shingle of so many is compared
_LEAST_SHINGLES = 25  # sampled, of either document: fewer say too little
_NEIGHBOURS = 16  # of those that share a shingle each is compared with so many: more is a common phrase
_NONE = np.empty(0, dtype=np.uint64)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_SHORTEST = 8  # characters: a "yes" that two people wrote is no copy
_WORD = re.compile(r"\w+")
# a script without spaces (Thai to Khmer, Japanese, Chinese) has its characters for words
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_ANY_UNSPACED = re.compile(f"[{_UNSPACED}]")
_CHARACTER_OR_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+")


def groups_of_copies(documents: Sequence[Document]) -> list[int]:
    """Return for each document the place of the first one that it is a copy of, which is its own if there is none."""
    first = list(range(len(documents)))

    def root(place: int) -> int:
        while first[place] != place:
            first[place] = first[first[place]]
            place = first[place]
        return place

    seen: dict[bytes, int] = {}
    shingles: list[np.ndarray] = []
    for place, document in enumerate(documents):
        text = normalised(document.text)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        known = seen.setdefault(digest, place) if len(text) >= _SHORTEST else place
        first[place] = known
        shingles.append(_shingles(text) if known == place else _NONE)
    for one, other in _near(shingles):
        low, high = sorted((root(one), root(other)))
        first[high] = low
    return [root(place) for place in range(len(documents))]


def normalised(text: str) -> str:
    """Return a text without what copies of it may differ in."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _shingles(text: str) -> np.ndarray:
    """Return the sampled hashes of a text's different runs of words."""
    if len(text) < _LEAST_SHINGLES:  # of two million rows most are short
        return _NONE
    words = (_CHARACTER_OR_WORD if _ANY_UNSPACED.search(text) else _WORD).findall(text)
    if len(words) < _WORDS_A_SHINGLE + _LEAST_SHINGLES:
        return _NONE
    codes = np.fromiter((zlib.crc32(word.encode()) for word in words), dtype=np.uint64, count=len(words))
    runs = len(words) - _WORDS_A_SHINGLE + 1
    hashes = np.zeros(runs, dtype=np.uint64)
    for offset in range(_WORDS_A_SHINGLE):  # a polynomial modulo 2^64, then its high bits stirred into the low ones
        hashes = hashes * _MULTIPLIER + codes[offset : offset + runs]
    hashes ^= hashes >> np.uint64(29)
    hashes *= _MULTIPLIER
    hashes ^= hashes >> np.uint64(32)
    return np.unique(hashes[hashes % _SAMPLED == 0])


def _near(shingles: Sequence[np.ndarray]) -> Iterator[tuple[int, int]]:
    """Yield pairs of documents of which one holds most of the shingles of the other."""
    sizes = np.array([len(each) for each in shingles], dtype=np.int64)
    owners = np.repeat(np.arange(len(sizes)), sizes)
    if not len(owners):
        return
    hashes = np.concatenate(shingles)
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], owners[order]
    pairs = []
    for distance in range(1, _NEIGHBOURS):
        same = np.flatnonzero(hashes[distance:] == hashes[:-distance])
        if not len(same):
            break
        pairs.append(owners[same] * len(sizes) + owners[same + distance])
    if not pairs:
        return
    found, shared = np.unique(np.concatenate(pairs), return_counts=True)
    one, other = found // len(sizes), found % len(sizes)
    least = np.minimum(sizes[one], sizes[other])
    near = (least >= _LEAST_SHINGLES) & (shared >= _CONTAINED * least)
    yield from zip(one[near].tolist(), other[near].tolist(), strict=True)
