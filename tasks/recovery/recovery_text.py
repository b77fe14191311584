"""The text that a pruned model is fine-tuned on: documents of the calibration split, end to end, in equal pieces."""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nirvana.errors import InputError
from tasks.corpus.documents import Document, in_turn
from tasks.corpus.span_corruption import PairMaker
from tasks.sample_pool import Encoder


def training_text(
    documents: Sequence[Document], encoder: Encoder, pairs: PairMaker | None, *, tokens: int, length: int, seed: int
) -> tuple[Tensor, ...]:
    """Return as many sequences as a budget of tokens takes, or all that the documents hold.

    Documents come in an order by hash and seed, sources in turn, joined by a blank line; as many are read as needed.

    Args:
        documents: Of the calibration split.
        encoder: Gives the tokens of a document. Its BOS token, if any, takes the place of each sequence's first.
        pairs: Makes sources and targets, for an encoder-decoder.
        tokens: The budget.
        length: Tokens of text a sequence.
        seed: Orders the documents.

    Returns:
        Token ids a stack, `[sequences, length]`. The last stack's every token but its first is to be predicted: an
        encoder-decoder's target with its end.

    Raises:
        InputError: If the documents do not fill one sequence.
    """
    order = f"recovery {seed}"
    wanted = math.ceil(tokens / length)
    separator = encoder(Document("", "\n\n"))
    pieces: list[np.ndarray] = []
    found = 0
    ordered = sorted(documents, key=lambda each: hashlib.sha256(f"{order}\0{each.id}".encode()).digest())
    for document in tqdm(in_turn(ordered, iter), desc="tokenizing documents", unit="", mininterval=1.0, leave=False):
        if found >= wanted * length:
            break
        pieces += [encoder(document), separator]
        found += len(pieces[-2]) + len(separator)
    count = min(wanted, found // length)
    if count == 0:
        raise InputError(
            f"recovery.sequence_length: expected calibration documents of {length} tokens or more in all, got {found}; "
            "lower it or use a larger corpus"
        )
    text = np.concatenate(pieces)[: count * length].reshape(count, length)
    if encoder.bos is not None:
        text[:, 0] = encoder.bos
    if pairs is None:
        return (torch.from_numpy(text),)
    made = pairs(text, order)
    targets = np.concatenate([made.decoder_input_ids, made.labels[:, -1:]], axis=1)
    return torch.from_numpy(made.input_ids), torch.from_numpy(targets)
