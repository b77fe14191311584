"""The real tokens that exports are compared on."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nirvana.checkpoint.companions import has_tokenizer
from nirvana.checkpoint.prose import PROSE
from nirvana.checkpoint.tokenizer import read_tokenizer
from nirvana.errors import InputError
from nirvana.files import read_json
from nirvana.walk import Stack

TOKENS = 128
"""Tokens of a comparison: an export that is wrong is wrong on the first few."""


def parity_ids(checkpoint: Path, stack: Stack, text: Path | None = None, ids: Path | None = None) -> Any:
    """Return one sequence of real token ids, or for an encoder-decoder a pair of source and decoder input.

    Args:
        checkpoint: Where the tokenizer is.
        stack: The model they are for.
        text: A UTF-8 text to use; a text of our own otherwise.
        ids: A file of ids instead: JSON (a list of integers) or safetensors (`input_ids`; its first sequence counts).

    Returns:
        What the walk takes for a batch of one sequence of at most `TOKENS` tokens.

    Raises:
        InputError: If a file cannot be read, there is no tokenizer, or there are fewer than two tokens.
    """
    tokens, decoder_tokens = _from_file(ids) if ids is not None else (_from_text(checkpoint, text), None)
    limit = min(TOKENS, getattr(stack.architecture.config, "max_position_embeddings", None) or TOKENS)
    if len(tokens) < 2:
        raise InputError(f"{ids or text}: expected at least 2 tokens to compare on, got {len(tokens)}; give more text")
    if not stack.architecture.is_encoder_decoder:
        pair: Any = torch.tensor(tokens[:limit])[None]
        stack.check_ids(pair)
        return pair
    if decoder_tokens is None:  # the second half follows on the first: shifted right, as in training
        start = getattr(stack.architecture.config, "decoder_start_token_id", None)
        if not isinstance(start, int):
            raise InputError(
                f"{checkpoint}/config.json: expected decoder_start_token_id, the token that a target begins after, "
                f"got {start!r}; add it (T5: the id of its pad token)"
            )
        middle = min(len(tokens), 2 * limit) // 2
        tokens, decoder_tokens = tokens[:middle], [start, *tokens[middle : 2 * middle - 1]]
    pair = (torch.tensor(tokens[:limit])[None], torch.tensor(decoder_tokens[:limit])[None])
    stack.check_ids(pair)
    return pair


def _from_text(checkpoint: Path, text: Path | None) -> list[int]:
    try:
        prose = PROSE if text is None else text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{text}: expected a UTF-8 text, got none ({error}); check the path") from error
    return _from_tokenizer(checkpoint, prose)


def _from_tokenizer(checkpoint: Path, prose: str) -> list[int]:
    hint = "put the dense model's tokenizer files there, or give token ids with --ids FILE"
    if not has_tokenizer(checkpoint):
        raise InputError(f"{checkpoint}: expected a tokenizer to read the text with, found none; {hint}")
    try:
        tokenizer = read_tokenizer(checkpoint)
    except InputError as error:
        raise InputError(f"{error}; or give token ids with --ids FILE") from error
    return list(tokenizer(prose, truncation=True, max_length=2 * TOKENS)["input_ids"])


def _from_file(path: Path) -> tuple[list[int], list[int] | None]:
    try:
        if path.suffix == ".safetensors":
            stored = {name: rows.reshape(-1, rows.shape[-1])[0].tolist() for name, rows in load_file(path).items()}
        else:
            value = read_json(path)
            stored = value if isinstance(value, dict) else {"input_ids": value}
        tokens, decoder_tokens = stored["input_ids"], stored.get("decoder_input_ids")
        for row in (tokens, decoder_tokens or []):
            if not all(type(token) is int and 0 <= token < 2**31 for token in row):
                raise TypeError(f"not token ids: {json.dumps(row)[:40]}")
        return tokens, decoder_tokens
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: expected token ids (a JSON list of integers, or safetensors with input_ids), "
            f"got something else ({' '.join(str(error).split())[:80]}); check the file"
        ) from error
