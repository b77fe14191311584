"""Text for an encoder-decoder: one stretch of tokens becomes a source that is read and a target that is written.

Where the tokenizer has sentinel tokens, by span corruption, which is what T5 was trained on: 15 % of the tokens leave
the source in spans of 3 on average, a sentinel of its own stands for each, and the target names each sentinel and the
tokens it stands for. Where it has none, the first half is the source and the second half the target.

    text      the  river  divides  the  old  nation  in  two
    source    the  river  <0>      old  nation  <1>  </s>
    target    <0>  divides  the  <1>  in  two  </s>

Sources of one length and targets of one length come of stretches of one length, so batches need no padding. As in
T5's own code a stretch begins with text and ends with a span, and no sentinel closes the target.

Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning" (arXiv 1910.10683), 3.1.4 and 3.3.4;
`random_spans_noise_mask` of github.com/google-research/text-to-text-transfer-transformer.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from nirvana.errors import InputError

NOISE_DENSITY = 0.15
MEAN_SPAN_TOKENS = 3

SPANS = "span_corruption"
HALVES = "halves"


@dataclass(frozen=True)
class Pairs:
    """Sources and what the decoder reads and predicts for each; every row of an array is one pair."""

    input_ids: np.ndarray
    """[pairs, source]"""
    decoder_input_ids: np.ndarray
    """[pairs, target]: the labels shifted right, the model's start token first."""
    labels: np.ndarray
    """[pairs, target]"""


@dataclass(frozen=True)
class PairMaker:
    """Makes pairs of stretches of token ids.

    Attributes:
        sentinels: Ids of `<extra_id_0>`, `<extra_id_1>`, ...; none: stretches are halved.
        eos: Ends every source and every target.
        start: What the decoder reads first.
    """

    sentinels: tuple[int, ...]
    eos: int
    start: int

    @classmethod
    def of_model(cls, tokenizer: Any, config: Any) -> "PairMaker":
        """Return the maker that fits a tokenizer and an encoder-decoder's configuration.

        Raises:
            InputError: If there is no EOS token or no start token.
        """
        start = getattr(config, "decoder_start_token_id", None)
        if not isinstance(start, int):
            raise InputError(
                "config.json: expected decoder_start_token_id, the token that an encoder-decoder's target begins "
                f"after, got {start!r}; add it (T5: the id of its pad token)"
            )
        if tokenizer.eos_token_id is None:
            raise InputError(
                "expected a tokenizer with an EOS token to end sources and targets with, this model's has none; "
                "set eos_token in tokenizer_config.json"
            )
        return cls(_sentinels(tokenizer), tokenizer.eos_token_id, start)

    @property
    def kind(self) -> str:
        """How sources and targets are made: `span_corruption` or `halves`."""
        return SPANS if self.sentinels else HALVES

    def __call__(self, stretches: np.ndarray, seed: str) -> Pairs:
        """Return a pair for each stretch of token ids.

        Args:
            stretches: [pairs, length] token ids, 2 or more a row.
            seed: Chooses the spans, together with the tokens themselves: a stretch gives the same pair wherever it
                stands.

        Raises:
            InputError: If the stretches need more sentinels than there are.
        """
        cut = self._spans if self.sentinels else self._halves
        rows = [cut(row, seed) for row in stretches]
        labels = np.stack([[*target, self.eos] for _, target in rows]).astype(np.int64)
        starts = np.full((len(rows), 1), self.start, dtype=np.int64)
        return Pairs(
            input_ids=np.stack([[*source, self.eos] for source, _ in rows]).astype(np.int64),
            decoder_input_ids=np.concatenate([starts, labels[:, :-1]], axis=1),
            labels=labels,
        )

    def _spans(self, tokens: np.ndarray, seed: str) -> tuple[list[int], list[int]]:
        noise, spans = span_counts(len(tokens))
        if spans > len(self.sentinels):
            raise InputError(
                f"expected stretches of text that {len(self.sentinels)} sentinel tokens suffice for, got "
                f"{len(tokens)} tokens, which need {spans}; lower calibration.sequence_length, "
                "calibration.heldout_length or evaluation.window"
            )
        digest = hashlib.sha256(seed.encode() + b"\0" + tokens.astype("<i8").tobytes()).digest()
        generator = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        source: list[int] = []
        target: list[int] = []
        position = 0
        lost = _segments(noise, spans, generator)
        kept = _segments(len(tokens) - noise, spans, generator)
        for sentinel, text, span in zip(self.sentinels, kept, lost, strict=False):
            source += [*tokens[position : position + text], sentinel]
            position += text
            target += [sentinel, *tokens[position : position + span]]
            position += span
        return source, target

    def _halves(self, tokens: np.ndarray, seed: str) -> tuple[list[int], list[int]]:
        middle = len(tokens) // 2
        return list(tokens[:middle]), list(tokens[middle:])


def span_counts(length: int) -> tuple[int, int]:
    """Return how many of `length` tokens leave the source, and in how many spans."""
    noise = min(max(round(length * NOISE_DENSITY), 1), length - 1)
    return noise, max(round(noise / MEAN_SPAN_TOKENS), 1)


def _segments(total: int, parts: int, generator: np.random.Generator) -> np.ndarray:
    """Cut `total` into non-empty parts, each way of doing so as likely as another."""
    cuts = np.sort(generator.permutation(total - 1)[: parts - 1]) + 1
    return np.diff([0, *cuts, total])


def _sentinels(tokenizer: Any) -> tuple[int, ...]:
    vocabulary = tokenizer.get_vocab()
    found: list[int] = []
    while (name := f"<extra_id_{len(found)}>") in vocabulary:
        found.append(vocabulary[name])
    return tuple(found)
