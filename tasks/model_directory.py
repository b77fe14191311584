"""What a Hugging Face model directory must hold before anything is computed from it."""

import json
import re
import struct
from pathlib import Path
from typing import Any

from nirvana.errors import InputError
from nirvana.files import read_json

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_TEXT_SUFFIXES = {".json", ".jinja", ".txt", ".model"}
_HEADER_LIMIT = 100 << 20  # bytes; the safetensors format allows no longer header

PICKLE_REMEDY = (
    "pickled weights (.bin, .pt) are not loaded because reading them can run code; convert them once with "
    "`AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OTHER_DIR)` in a place where you trust them"
)


def wanted_files(names: list[str], trust_remote_code: bool) -> list[str]:
    """Return the files of a model directory that are used: weights, configuration, tokenizer.

    Args:
        names: Paths relative to the directory; what lies deeper than its top level is ignored.
        trust_remote_code: Whether the model's own Python files are taken along.
    """
    suffixes = _TEXT_SUFFIXES | ({".py"} if trust_remote_code else set())
    return sorted(
        name for name in names if "/" not in name and (_WEIGHTS.fullmatch(name) or Path(name).suffix in suffixes)
    )


def has_weights(names: list[str]) -> bool:
    """Tell whether safetensors weights are among the names of files."""
    return any(_WEIGHTS.fullmatch(name) for name in names)


def check_model_directory(directory: Path, trust_remote_code: bool = False) -> None:
    """Check that a model directory is whole: configuration, complete weight files, a tokenizer that fits.

    Raises:
        InputError: If config.json is missing or unreadable, weights are missing, pickled or cut off, or the
            tokenizer knows more tokens than the model.
    """
    config = read_json(directory / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{directory}/config.json: expected a JSON object, got a {type(config).__name__}")
    for file in _weight_files(directory):
        check_safetensors(file)
    _check_vocabulary(directory, trust_remote_code)


def check_architecture(directory: Path) -> None:
    """Check that a directory's config.json is of a family that can be pruned; its weights may still be missing.

    Raises:
        InputError: If there is no readable configuration, or it is of another family.
    """
    from nirvana.architectures.registry import architecture_for, read_config

    architecture_for(read_config(directory))


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


def vocabulary_size(directory: Path, trust_remote_code: bool = False) -> int:
    """Return how many token ids the model of a directory has embeddings for.

    Raises:
        InputError: If transformers does not know the configuration, or it names no vocabulary.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise InputError(
            f"{directory}/config.json: transformers cannot read this configuration ({_one_line(error)}); "
            "choose a model that the installed transformers knows"
        ) from error
    size = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        raise InputError(f"{directory}/config.json: expected vocab_size, found none; choose a language model")
    return size


def load_tokenizer(directory: Path, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a model directory.

    Raises:
        InputError: If the directory holds no tokenizer that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare Exception on a broken tokenizer.json
        raise InputError(
            f"{directory}: expected tokenizer files, transformers cannot read them ({_one_line(error)}); "
            "put tokenizer.json and tokenizer_config.json beside the model"
        ) from error


def _weight_files(directory: Path) -> list[Path]:
    from nirvana.weights import weight_files  # imports torch

    try:
        return weight_files(directory)
    except InputError as error:
        pickled = sorted(file.name for file in directory.iterdir() if file.suffix in {".bin", ".pt", ".pth"})
        if not pickled:
            raise
        raise InputError(f"{error}; found {pickled[0]}: {PICKLE_REMEDY}") from error


def _check_vocabulary(directory: Path, trust_remote_code: bool) -> None:
    tokens = len(load_tokenizer(directory, trust_remote_code))
    size = vocabulary_size(directory, trust_remote_code)
    if tokens > size:
        raise InputError(
            f"{directory}: tokenizer and model do not fit: the tokenizer has {tokens} tokens, the model's vocab_size "
            f"is {size}; use the tokenizer that the model was trained with"
        )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
