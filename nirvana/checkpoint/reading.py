"""Which of two readings of its tokenizer a model was trained with: the model tells, by how it writes.

Where tokenizer.json as it stands and the class that transformers takes for a model type cut text differently, no file
says which counts. But a model expects tokens the way it read them in training. So it writes some text, which is cut in
both ways, and the reading counts under which it finds that text likely. It needs no text of ours, so it holds in any
language and domain.
"""

import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nirvana.checkpoint.companions import TOKENIZER_CONFIG, has_tokenizer, tokenizer_config
from nirvana.checkpoint.tokenizer import READING, TwoReadingsError, begins_with, read_tokenizer
from nirvana.checkpoint.tokenizer_page import ids
from nirvana.errors import InputError
from nirvana.files import write_json
from nirvana.generation import generate
from nirvana.loading import load_config, load_model
from nirvana.weights import WeightFiles

_LOG = logging.getLogger(__name__)
_SEQUENCES, _LENGTH = 16, 32
_APART = 0.05
"""Least relative difference between two losses of the same text that says something."""
_KNOWN = 0.7
"""Largest loss a token, as a share of that of a guess among all tokens, with which a model knows what it reads."""
_LARGEST = 8e9
"""Bytes of a model in float32 that is loaded to be asked; a larger one is not."""


class Losses(NamedTuple):
    """What a model makes of its own text under a reading."""

    file: float
    """Nats a character, read by tokenizer.json as it stands."""
    by_class: float
    """Nats a character, read by transformers' class."""
    guess: float
    """Loss a token under the better reading, as a share of a guess's."""

    @property
    def reading(self) -> str | None:
        """Return `file` or `class`; None where the model does not tell."""
        low, high = sorted((self.file, self.by_class))
        if self.guess > _KNOWN or high - low < _APART * low:
            return None
        return "file" if self.file < self.by_class else "class"


def settled_tokenizer(directory: Path | str) -> Any:
    """Return the tokenizer of a model directory, or None if it has none; of two readings the one that the model knows.

    Raises:
        InputError: As `read_tokenizer`, but for two readings.
    """
    directory = Path(directory)
    if not has_tokenizer(directory):
        return None
    try:
        return read_tokenizer(directory)
    except TwoReadingsError as error:
        return error.readings[_decide(directory, error)]


def settle(directory: Path) -> None:
    """Note in a model directory which of two readings of its tokenizer counts, if there are two.

    Raises:
        InputError: As `read_tokenizer`, but for two readings.
    """
    try:
        read_tokenizer(directory)
    except TwoReadingsError as error:
        choose(directory, _decide(directory, error))


def choose(directory: Path, reading: str) -> None:
    """Note in a model directory which of two readings of its tokenizer counts: `file` or `class`."""
    write_json(directory / TOKENIZER_CONFIG, tokenizer_config(directory) | {READING: reading})


def _decide(directory: Path, two: TwoReadingsError) -> str:
    """Return `file` or `class`, and say why in the log."""
    try:
        losses = losses_of_own_text(directory, two.readings)
    except InputError as error:
        _LOG.info("the model cannot be asked which reading of its tokenizer it knows: %s", error)
        losses = None
    reading = None if losses is None else losses.reading
    kind = type(two.readings["class"]).__name__
    if losses is not None and reading is not None:
        _LOG.warning(
            "two readings of the tokenizer; the model knows that of %s: its own text costs it %.2f nats a character "
            "read by tokenizer.json as it stands, %.2f by %s",
            "tokenizer.json" if reading == "file" else kind,
            losses.file,
            losses.by_class,
            kind,
        )
        return reading
    _LOG.warning(
        "two readings of the tokenizer, and the model does not tell which it knows: taken is that of %s, as for "
        "everyone who loads the model with transformers; set model.tokenizer to file if it was trained with the other",
        kind,
    )
    return "class"


@torch.no_grad()
def losses_of_own_text(directory: Path, readings: dict[str, Any]) -> Losses | None:
    """Let a model write, and read its text again in both ways.

    Args:
        directory: The model.
        readings: The two tokenizers, `file` and `class`.

    Returns:
        The losses; None for an encoder-decoder, which does not write from nothing, and for a model that is too large.

    Raises:
        InputError: If the model cannot be loaded, or writes nothing that can be read.
    """
    weights = WeightFiles(directory)
    numbers = sum(math.prod(weights.shape(name)) for name in weights)
    if load_config(directory).is_encoder_decoder or 4 * numbers > _LARGEST:
        return None
    model = load_model(directory)
    tokenizer, vocabulary = readings["file"], model.config.get_text_config().vocab_size
    writable = set(tokenizer.get_vocab().values()) & set(range(vocabulary)) - set(tokenizer.all_special_ids)
    written = generate(model, _SEQUENCES, _LENGTH, writable, bos=begins_with(tokenizer))
    texts = [str(text) for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
    characters = sum(map(len, texts))
    if not characters:
        raise InputError(f"{directory}: expected text that the model writes, got none; set model.tokenizer")
    by_reading = {name: _loss(model, readings[name], texts, vocabulary) for name in ("file", "class")}
    (file, file_tokens), (by_class, class_tokens) = by_reading["file"], by_reading["class"]
    best = file / file_tokens if file < by_class else by_class / class_tokens
    return Losses(file / characters, by_class / characters, best / math.log(vocabulary))


def _loss(model: Any, tokenizer: Any, texts: list[str], vocabulary: int) -> tuple[float, int]:
    """Return what all texts cost a model, in nats, and the number of its predictions."""
    total, predictions = 0.0, 0
    for text in texts:
        row = torch.tensor([token for token in ids(tokenizer, text, special=True) if token < vocabulary])
        if len(row) > 1:
            logits = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
            predictions += len(row) - 1
    return total, max(1, predictions)
