"""Step sample_pool: split the corpus by document and draw the calibration pool and the held-out batch from it.

A document goes to calibration (70 %), held-out (10 %) or evaluation (20 %) by the hash of its name alone, a copy by
that of the first document it is a copy of. So the size of the pool never changes what is judged, and adding a document
to the end moves no other.

Calibration documents are put in an order by hash and seed; each candidate takes the next few of them. A larger pool
therefore begins with the same candidates, as long as one sequence a document is enough to fill it.

Compensation fits on sequences of its own from the same calibration documents, for it needs more of them than saliency;
generate_text adds what the model writes. With `calibration.repeated` some sequences of both say a thing twice.

For an encoder-decoder each sequence of text then becomes a source and a target (tasks/corpus/span_corruption.py); the
lengths in params.yaml are those of the text.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from nirvana.architectures.registry import read_config
from nirvana.checkpoint.tokenizer import begins_with
from nirvana.errors import InputError
from nirvana.files import atomic_directory, atomic_file
from nirvana.repetition import with_repetition
from tasks.corpus.copies import groups_of_copies
from tasks.corpus.documents import Document, in_turn, read_documents, write_documents
from tasks.corpus.pieces import LONGEST, join_short, pieces
from tasks.corpus.span_corruption import PairMaker
from tasks.sources.model_directory import load_tokenizer, vocabulary_size

if TYPE_CHECKING:
    from tasks.params import Calibration, Params

_LOG = logging.getLogger(__name__)

# upper edges of the splits' shares of the hash range; the rest is evaluation
_CALIBRATION_BELOW = 0.7
_HELDOUT_BELOW = 0.8
# what any tokenizer makes of text, with room: bytes as tokens are 4, what a normaliser makes of one character more
_MOST_TOKENS_A_CHARACTER = 8
# of shares of a document; those before them are known not to suffice
_TRIES = 256
# by an Encoder: 128 MB; documents beyond are tokenised again when they are needed again
_TOKENS_HELD = 1 << 24
_TOKENS_AN_ENTRY = 64


def run(params: Params, inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> None:
    """Write the pool, the held-out batch, what compensation fits on and the evaluation documents.

    Raises:
        InputError: If the corpus is too small for the pool, or the tokenizer does not fit the model.
    """
    calibration = params.calibration
    splits = split_documents(read_documents(inputs["corpus"] / "documents.jsonl"))
    encoder = Encoder.of_model(inputs["model"], calibration.add_bos)
    pool, heldout, fitted = draw_all(params, splits, encoder)
    config = read_config(inputs["model"])
    pairs = PairMaker.of_model(encoder.tokenizer, config) if config.is_encoder_decoder else None
    repeated = calibration.repeated
    drawn = {
        "candidates": (pool, with_repetition(pool.input_ids, repeated)),
        "heldout": (heldout, heldout.input_ids[0]),
        "compensation_corpus": (fitted, with_repetition(fitted.input_ids[0], repeated)),
    }
    # all of them made before any is written
    made = {name: _tensors(ids, pairs, batch.order) for name, (batch, ids) in drawn.items()}
    for name, (batch, _) in drawn.items():
        save_ids(made[name], batch.documents, outputs[name])
    with atomic_directory(outputs["evaluation_data"]) as directory:
        write_documents(directory / "documents.jsonl", splits["evaluation"])
    _LOG.info("pool of %s tokens from %d documents", pool.input_ids.shape, sum(map(len, pool.documents)))


def draw_all(params: Params, splits: Mapping[str, Sequence[Document]], encoder: Encoder) -> tuple[Pool, Pool, Pool]:
    """Draw candidates, the held-out batch, and what compensation fits on: no sequences, if nothing is compensated.

    Args:
        params: Reads `calibration` and `compensation`.
        splits: As `split_documents` makes them.
        encoder: Gives the tokens of a document.

    Raises:
        InputError: If a split does not suffice, or there is nothing to evaluate on.
    """
    pool = draw_candidates(params.calibration, splits["calibration"], encoder)
    heldout = draw_heldout(params.calibration, splits["heldout"], encoder)
    fitted = Pool(np.empty((1, 0, params.compensation.sequence_length), dtype=np.int64), [], "nothing")
    if params.compensation.method != "none":
        fitted = draw_compensation(params, splits["calibration"], encoder, params.compensation.sequences)
    if not splits["evaluation"]:
        raise InputError(
            f"corpus: expected documents to evaluate on, none of its {sum(map(len, splits.values()))} fell into the "
            "evaluation split (20 % by hash; copies go together); use a corpus of more documents, which are files of "
            "text or rows"
        )
    return pool, heldout, fitted


def draw_candidates(asked: Calibration, documents: Sequence[Document], encoder: Encoder) -> Pool:
    """Return the pool of candidates, a batch each."""
    return draw(
        long_enough(documents, encoder, asked.pool_size * asked.sequences, asked.sequence_length),
        encoder,
        batches=asked.pool_size,
        sequences=asked.sequences,
        length=asked.sequence_length,
        order=f"calibration {asked.seed}",
        names=("calibration.pool_size", "calibration.sequences", "calibration.sequence_length"),
    )


def draw_heldout(asked: Calibration, documents: Sequence[Document], encoder: Encoder) -> Pool:
    """Return the held-out batch; not by the seed, for pools of different seeds are compared by the same measure."""
    return draw(
        long_enough(documents, encoder, asked.heldout_sequences, asked.heldout_length),
        encoder,
        batches=1,
        sequences=asked.heldout_sequences,
        length=asked.heldout_length,
        order="heldout",
        names=(None, "calibration.heldout_sequences", "calibration.heldout_length"),
    )


def long_enough(documents: Sequence[Document], encoder: Encoder, sequences: int, length: int) -> Sequence[Document]:
    """Return documents that can give so many sequences: themselves, or neighbours joined where they are too short.

    Args:
        documents: Of one split.
        encoder: Gives the tokens of a document.
        sequences: Wanted in all.
        length: Tokens a sequence.
    """

    def enough(some: Sequence[Document]) -> bool:
        found = 0
        # no more of them are tokenised than it takes
        for document in tqdm(some, desc="tokenizing documents", unit="", mininterval=1.0, leave=False):
            found += len(encoder(document)) // length
            if found >= sequences:
                return True
        return False

    if too_much(documents, sequences * length) or enough(documents):
        return documents
    joined = join_short(documents, lambda document: len(encoder(document)), length)
    if len(joined) == len(documents) or not enough(joined):
        return documents
    _LOG.warning(
        "documents are too short for %d sequences of %d tokens: of %d, neighbours are joined by a blank line, which "
        "makes %d; a sequence may go over the end of one",
        sequences,
        length,
        len(documents),
        len(joined),
    )
    return joined


def draw_compensation(
    params: Params,
    documents: Sequence[Document],
    encoder: Encoder,
    sequences: int,
    name: str = "compensation.sequences",
) -> Pool:
    """Return one batch that compensation fits on; `name` is where `sequences` was asked for."""
    return draw(
        long_enough(documents, encoder, sequences, params.compensation.sequence_length),
        encoder,
        batches=1,
        sequences=sequences,
        length=params.compensation.sequence_length,
        order=f"compensation {params.calibration.seed}",
        names=(None, name, "compensation.sequence_length"),
    )


def split_documents(documents: Sequence[Document]) -> dict[str, list[Document]]:
    """Sort documents into calibration, heldout and evaluation by the SHA-256 of their names, keeping their order.

    Copies of a document (tasks/corpus/copies.py) go where its first goes: what was calibrated on judges nothing.
    """
    splits: dict[str, list[Document]] = {"calibration": [], "heldout": [], "evaluation": []}
    firsts = groups_of_copies(documents)
    for document, first in zip(documents, firsts, strict=True):
        share = _hash(documents[first].id) / 2**64
        if share < _CALIBRATION_BELOW:
            splits["calibration"].append(document)
        elif share < _HELDOUT_BELOW:
            splits["heldout"].append(document)
        else:
            splits["evaluation"].append(document)
    if copies := [place for place, first in enumerate(firsts) if place != first]:
        _LOG.warning(
            "%d of %d documents are copies or parts of others, such as %s of %s; each is in the split of the first",
            len(copies),
            len(documents),
            documents[copies[0]].id,
            documents[firsts[copies[0]]].id,
        )
    return splits


@dataclass
class Encoder:
    """Turns documents into token ids, each once while the memory that is set aside for them suffices.

    `bos`, when not None, takes the place of each sequence's first token; `vocabulary` is the model's.
    """

    tokenizer: Any
    vocabulary: int
    bos: int | None = None
    _tokens: dict[Document, np.ndarray] = field(default_factory=dict)
    _held: int = 0
    """Tokens in `_tokens`, and what its entries take besides."""

    @classmethod
    def of_model(cls, model: Path, add_bos: bool | None) -> Encoder:
        """Return the encoder of a model directory; `add_bos` None puts before a text what the tokenizer puts there.

        Raises:
            InputError: If a BOS token is asked for and the tokenizer has none.
        """
        tokenizer = load_tokenizer(model)
        if add_bos and tokenizer.bos_token_id is None:
            raise InputError(
                "calibration.add_bos: expected a tokenizer with a BOS token, this model's has none; set it to false"
            )
        bos = begins_with(tokenizer)
        if add_bos is not None:
            # not put twice: where the tokenizer itself puts another token than BOS, that one is the beginning
            bos = (tokenizer.bos_token_id if bos is None else bos) if add_bos else None
        return cls(tokenizer, vocabulary_size(model), bos)

    def __call__(self, document: Document) -> np.ndarray:
        """Return the token ids of a whole document.

        Raises:
            InputError: If a token is not in the model's vocabulary.
        """
        # by the document, not its name: two sources read apart may use one name
        tokens = self._tokens.get(document)
        if tokens is None:
            parts = [self._encode(document.id, text) for text in pieces(document.text, LONGEST)]
            tokens = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype=np.int64), *parts])
            self._held += len(tokens) + _TOKENS_AN_ENTRY
            while self._tokens and self._held > _TOKENS_HELD:
                self._held -= len(self._tokens.pop(next(iter(self._tokens)))) + _TOKENS_AN_ENTRY
            self._tokens[document] = tokens
        return tokens

    def _encode(self, name: str, text: str) -> np.ndarray:
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = np.asarray(ids, dtype=np.int64)
        largest = max(int(tokens.max(initial=0)), self.bos or 0)
        if largest >= self.vocabulary:
            raise InputError(
                f"corpus document {name}: token {largest} is outside the model's vocabulary of "
                f"{self.vocabulary}; use the tokenizer that the model was trained with"
            )
        return tokens


@dataclass(frozen=True)
class Pool:
    """Batches of sequences: `input_ids` [batches, sequences, length], and the documents of each batch."""

    input_ids: np.ndarray
    documents: list[list[str]]
    order: str
    """What ordered the documents and placed the windows."""


def draw(
    documents: Sequence[Document],
    encoder: Encoder,
    *,
    batches: int,
    sequences: int,
    length: int,
    order: str,
    names: tuple[str | None, str, str],
) -> Pool:
    """Draw batches that share no document; each sequence is a random contiguous window of one document.

    The corpus's sources give a document each in turn, as many to within one while they last. Where documents have to
    give several sequences, those of longer documents give more.

    Args:
        documents: What may be used; documents shorter than `length` tokens are skipped.
        encoder: Gives the tokens of a document.
        batches: Number of batches.
        sequences: Sequences a batch, from different documents unless there are too few.
        length: Tokens a sequence.
        order: Text that, hashed with a document's name, orders the documents and places the windows.
        names: What the three numbers are called in params.yaml; None: no key, it is 1.

    Raises:
        InputError: If the documents do not suffice.
    """
    ordered = sorted(documents, key=lambda document: _hash(order, document.id))

    def usable(of_source: Sequence[Document]) -> Iterator[Document]:
        return (document for document in of_source if len(encoder(document)) >= length)

    if documents and too_much(documents, batches * sequences * length):
        raise InputError(
            f"{names[0] or names[1]}: expected {batches} x {sequences} sequences of {length} tokens, many times what "
            f"the {len(documents)} documents of this split hold, which have "
            f"{sum(len(each.text) for each in documents)} characters; {_remedy(names)}"
        )
    reached = 0
    for per_document in _most_a_document(ordered, encoder, batches, sequences, length):
        plan = _assign(in_turn(ordered, usable), encoder, batches, sequences, length, per_document)
        if len(plan) == batches:
            rows = [_windows(encoder, document, count, length, order) for batch in plan for document, count in batch]
            ids = np.concatenate(rows).reshape(batches, sequences, length)
            return Pool(ids, [[document.id for document, _ in batch] for batch in plan], order)
        reached = max(reached, len(plan))
    lengths = [len(encoder(document)) for document in ordered]
    long_enough = sum(tokens >= length for tokens in lengths)
    raise InputError(
        f"{names[0] or names[1]}: expected {batches} x {sequences} sequences of {length} tokens from documents of "
        f"their own, the corpus allows {reached} such batches (this split has {len(documents)} documents, which are "
        f"files of text or rows, {long_enough} of at least {length} tokens, "
        f"{sum(tokens // length for tokens in lengths)} sequences in all); {_remedy(names)}"
    )


def _remedy(names: tuple[str | None, str, str]) -> str:
    *keys, last = [name for name in names if name is not None]
    return f"lower {', '.join(keys)} or {last}, or use a larger corpus (corpus.source, corpus.max_documents)"


def too_much(documents: Iterable[Document], tokens: int) -> bool:
    """Tell whether documents hold fewer tokens in all by any tokenizer; nothing is tokenised."""
    return tokens > _MOST_TOKENS_A_CHARACTER * sum(len(document.text) + 1 for document in documents)


def _most_a_document(
    documents: Sequence[Document], encoder: Encoder, batches: int, sequences: int, length: int
) -> Iterator[int]:
    """Yield how many sequences a document may give at most, from 1 up, leaving out what cannot suffice."""
    yield 1  # looks at no more documents than it needs
    units = np.array([len(encoder(document)) // length for document in documents], dtype=np.int64)
    largest = min(sequences, int(units.max(initial=0)))
    first = 2
    if np.minimum(units, largest).sum() >= batches * sequences:
        low, high = 1, largest  # the least that gives enough sequences in all, by halving
        while low < high:
            middle = (low + high) // 2
            enough = np.minimum(units, middle).sum() >= batches * sequences
            low, high = (low, middle) if enough else (middle + 1, high)
        first = max(2, low)
    tries = range(first, largest + 1)
    yield from tries[:_TRIES]
    if len(tries) > _TRIES:
        yield largest


def _assign(
    usable: Iterable[Document], encoder: Encoder, batches: int, sequences: int, length: int, per_document: int
) -> list[list[tuple[Document, int]]]:
    """Give each batch its documents and the number of sequences of each; drop a last batch that stays incomplete."""
    plan: list[list[tuple[Document, int]]] = []
    batch: list[tuple[Document, int]] = []
    missing = sequences
    for document in tqdm(usable, desc="tokenizing documents", unit="", mininterval=1.0, leave=False):
        count = min(per_document, len(encoder(document)) // length, missing)
        batch.append((document, count))
        missing -= count
        if missing == 0:
            plan.append(batch)
            batch, missing = [], sequences
            if len(plan) == batches:
                break
    return plan


def _windows(encoder: Encoder, document: Document, count: int, length: int, order: str) -> np.ndarray:
    """Cut one random window out of each of `count` equal parts of a document: [count, length], without overlap."""
    tokens = encoder(document)
    part = len(tokens) // count
    rows = np.empty((count, length), dtype=np.int64)
    for index in range(count):
        start = index * part + _hash(order, document.id, str(index)) % (part - length + 1)
        rows[index] = tokens[start : start + length]
    if encoder.bos is not None:
        rows[:, 0] = encoder.bos
    return rows


def _hash(*parts: str) -> int:
    """Return 64 bits of SHA-256: the same on every machine and in every Python."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big")


def _tensors(text: np.ndarray, pairs: PairMaker | None, order: str) -> dict[str, np.ndarray]:
    """Return what the model reads for text `[..., length]`: the text itself, or sources and targets of it."""
    if pairs is None or not text.size:
        return {"input_ids": text}
    made = pairs(text.reshape(-1, text.shape[-1]), order)
    ids = {"input_ids": made.input_ids, "decoder_input_ids": made.decoder_input_ids}
    return {name: rows.reshape(*text.shape[:-1], -1) for name, rows in ids.items()}


def save_ids(tensors: Mapping[str, np.ndarray], documents: list[list[str]], path: Path) -> None:
    """Write token ids and, as metadata, the names of the documents that each batch was drawn from."""
    # one metadata key only: safetensors writes several in random order
    metadata = {"documents": json.dumps(documents, ensure_ascii=False)}
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(contiguous, temporary, metadata=metadata)
        temporary.chmod(0o644)


def documents_of(path: Path) -> list[list[str]]:
    """Return the names of the documents that a file of `save_ids` was drawn from."""
    with safe_open(path, "numpy") as file:
        documents: list[list[str]] = json.loads(file.metadata()["documents"])
    return documents
