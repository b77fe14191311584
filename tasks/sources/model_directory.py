"""What a Hugging Face model directory must hold before anything is computed from it."""

import json
import logging
import re
import struct
from pathlib import Path
from typing import Any

from nirvana.errors import InputError
from nirvana.files import read_json
from nirvana.weight_names import INDEX_NAME, WEIGHTS_NAME

_LOG = logging.getLogger(__name__)

_TEXT_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".bpe", ".vocab"}
_LEGAL = re.compile(r"(licen[cs]e|notice|copying|copyright|use_policy)", re.IGNORECASE)
_CHAT_TEMPLATE = re.compile(r"additional_chat_templates/[^/]+\.jinja")
_HEADER_LIMIT = 100 << 20  # bytes; the safetensors format allows no longer header


def wanted_files(names: list[str], weights: list[str], trust_remote_code: bool) -> list[str]:
    """Return the files of a model directory that are used: weights, configuration, tokenizer, licence.

    Args:
        names: Paths relative to the directory; deeper than its top level, only further chat templates are taken.
        weights: Those that hold the weights, as `nirvana.weight_names` tells.
        trust_remote_code: Whether the model's own Python files are taken along.
    """
    suffixes = _TEXT_SUFFIXES | ({".py"} if trust_remote_code else set())
    index = {INDEX_NAME} if weights != [WEIGHTS_NAME] else set()  # an index of other weights stays behind

    def is_wanted(name: str) -> bool:
        if "/" in name:
            return bool(_CHAT_TEMPLATE.fullmatch(name))
        if name.endswith(".index.json"):
            return name in index
        return Path(name).suffix in suffixes or bool(_LEGAL.match(name))

    return sorted({*weights, *filter(is_wanted, names)})


def check_model_directory(directory: Path, trust_remote_code: bool = False) -> None:
    """Check that a model directory is whole: configuration, complete weight files, a tokenizer that fits.

    Raises:
        InputError: If config.json is missing or unreadable, weights are missing, pickled or cut off, or the
            tokenizer knows more tokens than the model.
    """
    config = read_json(directory / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{directory}/config.json: expected a JSON object, got a {type(config).__name__}")
    from nirvana.weights import weight_files  # imports torch

    for file in weight_files(directory):
        check_safetensors(file)
    _check_vocabulary(directory, trust_remote_code)


def check_architecture(directory: Path) -> None:
    """Check that a directory's config.json is of a model that can be pruned; its weights may still be missing.

    Raises:
        InputError: If there is no readable configuration, it is of another family or of a quantised model.
    """
    from nirvana.architectures.registry import architecture_for, check_supported, read_config
    from nirvana.text_part import holds_text_part

    config = read_config(directory)
    check_supported(config, str(directory))
    if not holds_text_part(config):
        architecture_for(config)


def check_safetensors(path: Path) -> None:
    """Check that a safetensors file is as long as its header says.

    Raises:
        InputError: If the header cannot be read, or the file is shorter or longer than the tensors it lists.
    """
    remedy = "the file is corrupted or cut off: fetch it again"
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise InputError(f"{path}: expected a safetensors header, got {size} bytes without one; {remedy}")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise InputError(f"{path}: expected a safetensors header, got something else; {remedy}") from None
    if size != expected:
        raise InputError(f"{path}: expected {expected} bytes as its header says, got {size}; {remedy}")


def vocabulary_size(directory: Path) -> int:
    """Return how many token ids the model of a directory has embeddings for.

    Raises:
        InputError: If transformers does not know the configuration, or it names no vocabulary.
    """
    from nirvana.architectures.registry import read_config

    config = read_config(directory)
    size = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        raise InputError(f"{directory}/config.json: expected vocab_size, found none; choose a language model")
    return size


def load_tokenizer(directory: Path, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a model directory: the one reading of its files, wherever text is read for the model.

    Raises:
        InputError: If the directory holds no whole tokenizer that transformers can read, or one of two readings.
    """
    from nirvana.checkpoint.tokenizer import read_tokenizer  # imports transformers

    return read_tokenizer(directory, trust_remote_code)


def readings(directory: Path) -> Any:
    """Return the tokenizer of a directory, or the error that holds both where there are two."""
    from nirvana.checkpoint.tokenizer import TwoReadingsError

    try:
        return load_tokenizer(directory)
    except TwoReadingsError as error:
        return error


def reads_alike(known: Any, text_part: Path) -> bool:
    """Tell whether a text part reads text as the model around it; of two readings the wrapper's is noted there.

    transformers takes a class by model type, and the text part has another. Where the wrapper itself has two readings
    the text part has the same two, and which of them counts is for `settle_reading`.

    Args:
        known: What `readings` returned for the wrapper.
        text_part: Holds the same tokenizer files.
    """
    from nirvana.checkpoint.reading import choose
    from nirvana.checkpoint.tokenizer import TwoReadingsError
    from nirvana.checkpoint.tokenizer_page import ORDINARY, first_difference

    found = readings(text_part)
    if not isinstance(found, TwoReadingsError):
        return not isinstance(known, TwoReadingsError) and first_difference(known, found, ORDINARY) is None
    both = found.readings
    if isinstance(known, TwoReadingsError):
        return all(first_difference(known.readings[name], both[name], ORDINARY) is None for name in both)
    alike = [name for name in both if first_difference(known, both[name], ORDINARY) is None]
    if alike:
        choose(text_part, alike[0])
    return bool(alike)


def settle_reading(directory: Path, asked: str | None) -> None:
    """Note in a model directory which of two readings of its tokenizer counts, where there are two.

    Args:
        directory: The model, whole.
        asked: `file` or `class`; None: the one that the model knows.

    Raises:
        InputError: If there is no tokenizer that can be read.
    """
    from nirvana.checkpoint.reading import choose, settle  # imports torch

    if asked is None:
        settle(directory)
    else:
        choose(directory, asked)


def _check_vocabulary(directory: Path, trust_remote_code: bool) -> None:
    tokenizer, size = load_tokenizer(directory, trust_remote_code), vocabulary_size(directory)
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= size}
    if not beyond:
        return
    if not set(beyond.values()) <= set(tokenizer.all_special_ids):
        raise InputError(
            f"{directory}: tokenizer and model do not fit: the tokenizer has {len(tokenizer)} tokens, the model's "
            f"vocab_size is {size}; use the tokenizer that the model was trained with"
        )
    _LOG.warning(
        "the tokenizer has special tokens that the model has no embedding for (%s, vocab_size %d): no text may hold "
        "them, and nothing may be padded with them",
        ", ".join(sorted(beyond)[:5]),
        size,
    )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
