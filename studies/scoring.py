"""Zero-shot items scored through whatever gives hidden states: no model is built, no lm-eval started.

It answers as lm-eval does on the tasks `cloze` and `continuation` (tests hold it to that): thousands of items can be
asked of a plan while it walks over the dense model's layers. Decoder-only models.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from nirvana.errors import InputError
from nirvana.head import likeliest_tokens, token_losses

HiddenOf = Callable[[Int[Tensor, "batch tokens"]], Float[Tensor, "batch tokens hidden"]]
BATCH_TOKENS = 8192
"""Padded tokens a call: a walk slices each layer once a call, and keeps this many hidden states."""


@dataclass(frozen=True)
class _Row:
    """One continuation in its context: the model predicts the tokens from `start` on."""

    ids: tuple[int, ...]
    start: int


def score_items(
    hidden_of: HiddenOf,
    head: Float[Tensor, "vocab hidden"],
    items: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    softcap: float | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> NDArray[np.bool_]:
    """Tell which items a model answers rightly.

    Args:
        hidden_of: Gives what the head reads at every position of right-padded sequences, for example a walk of a plan
            (`nirvana.walk.final_hidden_states`). Causal: the padding must not reach back.
        head: Output head.
        items: {"context", "target"}: right if every token of the target is the most likely one. {"context",
            "choices", "label"}: right if that choice has the highest log-likelihood a character (lm-eval's `acc_norm`).
        tokenizer: The model's.
        softcap: Of the logits, if the architecture has one.
        batch_tokens: Padded tokens a call of `hidden_of`.

    Returns:
        One answer an item, in order.

    Raises:
        InputError: If an item is of neither kind, or a continuation adds no token.
    """
    chosen = np.array(["choices" in item for item in items], dtype=bool)
    rows = [[_row(tokenizer, item["context"], text) for text in _continuations(item)] for item in items]
    answers = np.empty(len(items), dtype=bool)
    words = [row for index in np.flatnonzero(~chosen).tolist() for row in rows[index]]
    answers[~chosen] = _are_likeliest(_predictions(hidden_of, words, batch_tokens), len(words), head)
    endings = [row for index in np.flatnonzero(chosen).tolist() for row in rows[index]]
    losses = _losses(_predictions(hidden_of, endings, batch_tokens), len(endings), head, softcap)
    first = 0
    for index in np.flatnonzero(chosen).tolist():
        characters = [len(choice) for choice in items[index]["choices"]]
        of_item = losses[first : (first := first + len(characters))]
        answers[index] = int(np.argmin(of_item / characters)) == items[index]["label"]
    return answers


def _continuations(item: Mapping[str, Any]) -> Sequence[str]:
    if "choices" in item and "label" in item:
        return item["choices"]  # type: ignore[no-any-return]
    if "target" in item:
        return [item["target"]]
    raise InputError(
        f"expected items with context and target, or context, choices and label, got {sorted(item)}; "
        "make them with tasks/evaluation/cloze.py or tasks/evaluation/continuation.py"
    )


def _row(tokenizer: Any, context: str, continuation: str) -> _Row:
    """Encode as lm-eval does: the whole, of which the context's tokens are the first."""
    start, ids = len(tokenizer.encode(context)), tokenizer.encode(context + continuation)
    if not 0 < start < len(ids):
        raise InputError(
            f"expected a continuation that adds tokens to its context, got {continuation!r} after "
            f"...{context[-30:]!r}; leave the item out"
        )
    return _Row(tuple(ids), start)


def _batches(rows: Sequence[_Row], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the rows' numbers, longest first, so that rows of a batch are about as long."""
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: (-len(rows[index].ids), index)):
        if batch and (len(batch) + 1) * len(rows[batch[0]].ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@dataclass(frozen=True)
class _Predictions:
    """What a batch of rows predicts: hidden states and the tokens that follow, row after row."""

    rows: list[int]
    hidden: Float[Tensor, "positions hidden"]
    targets: Int[Tensor, " positions"]
    lengths: list[int]


def _predictions(hidden_of: HiddenOf, rows: Sequence[_Row], batch_tokens: int) -> Iterator[_Predictions]:
    """Walk over the rows and keep the positions that predict their continuations."""
    for batch in _batches(rows, batch_tokens):
        chosen = [rows[index] for index in batch]
        ids = torch.zeros(len(chosen), len(chosen[0].ids), dtype=torch.long)
        for number, row in enumerate(chosen):
            ids[number, : len(row.ids)] = torch.tensor(row.ids)
        hidden = hidden_of(ids)
        kept = torch.cat([hidden[number, row.start - 1 : len(row.ids) - 1] for number, row in enumerate(chosen)])
        targets = torch.tensor([token for row in chosen for token in row.ids[row.start :]], device=kept.device)
        yield _Predictions(batch, kept, targets, [len(row.ids) - row.start for row in chosen])


def _losses(
    predictions: Iterable[_Predictions], count: int, head: Float[Tensor, "vocab hidden"], softcap: float | None
) -> NDArray[np.float64]:
    """Return the negative log-likelihood of each row's continuation."""
    losses = np.empty(count)
    for batch in predictions:
        of_token = token_losses(batch.hidden, batch.targets, head, softcap)
        losses[batch.rows] = [float(each.sum()) for each in of_token.split(batch.lengths)]
    return losses


def _are_likeliest(
    predictions: Iterable[_Predictions], count: int, head: Float[Tensor, "vocab hidden"]
) -> NDArray[np.bool_]:
    """Tell of each row whether every token is the likeliest; a cap of the logits would keep their order."""
    right = np.empty(count, dtype=bool)
    for batch in predictions:
        hits = likeliest_tokens(batch.hidden, head) == batch.targets
        right[batch.rows] = [bool(each.all()) for each in hits.split(batch.lengths)]
    return right
