"""Texts that calibration batches are drawn from, each with what it judges by: the corpus, or token ids of another."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from nirvana.errors import InputError
from nirvana.perplexity import windows_from_documents
from studies.comparison import Text
from studies.texts import WINDOW, texts_of_ids
from tasks.corpus.documents import read_documents
from tasks.sample_pool import Encoder, draw, draw_heldout, split_documents

if TYPE_CHECKING:
    from tasks.params import Params

CORPUS, OTHER = "corpus", "ids"
"""What the sources are called."""


@dataclass(frozen=True, eq=False)
class Source:
    """One kind of text: batches to calibrate on, and two texts of the same kind to judge by."""

    name: str
    heldout: Text
    """KL(dense‖pruned) is taken on it."""
    evaluation: Text
    """Windows for perplexity."""
    draw: Callable[[int, int, int], Int[Tensor, "batches sequences tokens"]]
    """From the number of batches, sequences and tokens; an InputError where there is too little text."""

    def batches(self, count: int, sequences: int, length: int) -> list[Text]:
        """Return batches that share no text.

        Raises:
            InputError: If there is too little text for so many.
        """
        return [Text(batch.clone()) for batch in self.draw(count, sequences, length)]

    def as_many(self, count: int, sequences: int, length: int) -> list[Text]:
        """Return up to `count` batches, as many as there is text for: maybe none."""
        for fewer in range(count, 0, -1):
            with suppress(InputError):
                return self.batches(fewer, sequences, length)
        return []


def corpus_source(params: "Params", model: Path, corpus: Path, tokens: int) -> Source:
    """Draw as the pipeline does: its candidates are the first batches of as many sequences and tokens.

    Args:
        params: How the pipeline draws; its held-out batch is this one's.
        model: The dense model, whose tokenizer reads documents.
        corpus: The directory that fetch_corpus writes.
        tokens: Evaluation tokens, BOS included; rounded up to windows of `WINDOW`.

    Raises:
        InputError: If the corpus is missing or too small.
    """
    asked = params.calibration
    splits = split_documents(read_documents(corpus / "documents.jsonl"))
    encoder = Encoder.of_model(model, asked.add_bos)
    heldout = draw_heldout(asked, splits["heldout"], encoder)

    def drawn(batches: int, sequences: int, length: int) -> Tensor:
        pool = draw(
            splits["calibration"],
            encoder,
            batches=batches,
            sequences=sequences,
            length=length,
            order=f"calibration {asked.seed}",
            names=("batches", "sequences a batch", "tokens a sequence"),
        )
        return torch.from_numpy(pool.input_ids)

    texts: Iterable[str] = (document.text for document in splits["evaluation"])
    bos = encoder.tokenizer.bos_token_id is not None
    evaluation = windows_from_documents(encoder.tokenizer, texts, WINDOW, tokens, bos)
    return Source(CORPUS, Text(torch.from_numpy(heldout.input_ids[0])), Text(evaluation), drawn)


def ids_source(directory: Path, tokens: int) -> Source:
    """Take batches one after the other from calibration_ids, then calibration_extra_ids (`texts_of_ids`).

    Args:
        directory: Of the `.json` files.
        tokens: Evaluation tokens, rounded down to whole windows; all there are where there are fewer.

    Raises:
        InputError: If a file is missing or of another form.
    """
    whole = texts_of_ids(directory)
    windows = max(1, tokens // whole.evaluation.ids.shape[1])
    rows = whole.compensation.ids  # all of both files

    def taken(batches: int, sequences: int, length: int) -> Tensor:
        if batches * sequences > len(rows) or length > rows.shape[1]:
            raise InputError(
                f"{directory}: expected {batches} x {sequences} sequences of {length} tokens to calibrate on, got "
                f"{len(rows)} of {rows.shape[1]}; ask for fewer or shorter ones"
            )
        return rows[: batches * sequences, :length].reshape(batches, sequences, length)

    return Source(OTHER, whole.heldout, Text(whole.evaluation.ids[:windows].clone()), taken)
