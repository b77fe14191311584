"""What lies beside a model's weights and belongs to them: vocabularies, chat templates, how to generate, the licence.

Adapters, other weights and code stay behind.
"""

import fnmatch
import json
from pathlib import Path
from typing import Any

from nirvana.errors import InputError
from nirvana.files import copy_regular

TOKENIZER_CONFIG = "tokenizer_config.json"
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model*",  # tokenizer.model.v3 of Mistral
    "*.model",  # spiece.model, sentencepiece.bpe.model, spm.model, ...
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "encoder.json",
    "merges.txt",
)
"""Any one of these can hold a tokenizer's tokens."""
LEGACY = ("special_tokens_map.json", "added_tokens.json")
"""What older releases wrote beside tokenizer_config.json; newer ones read it where that file is silent."""
_CARRIED = (
    *VOCABULARIES,
    *LEGACY,
    "tokenizer*.json",
    "chat_template*",
    "generation_config.json",
    "license*",
    "licence*",
    "notice*",
    "copying*",
    "use_policy*",
    "additional_chat_templates/*.jinja",
)
_NEVER = ("*.py", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.gguf")


def companions(directory: Path) -> list[Path]:
    """Return the files beside the weights that go where the model goes, whatever the case of their names."""
    here = [*directory.iterdir(), *(directory / "additional_chat_templates").glob("*")]
    names = {file: file.relative_to(directory).as_posix().lower() for file in here if not file.is_dir()}
    carried = [file for file, name in names.items() if _matches(name, _CARRIED) and not _matches(name, _NEVER)]
    return sorted(carried)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what goes along with a model; never code, never other weights.

    Raises:
        InputError: If a file is a link to one that is not the model's.
    """
    for file in companions(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        copy_regular(file, copy, source)


def has_tokenizer(directory: Path) -> bool:
    """Tell whether a directory holds a vocabulary, or names a tokenizer that needs none (bytes)."""
    if any(_matches(file.name.lower(), VOCABULARIES) for file in directory.iterdir() if file.is_file()):
        return True
    return "tokenizer_class" in tokenizer_config(directory)


def tokenizer_config(directory: Path) -> dict[str, Any]:
    """Return the contents of tokenizer_config.json; nothing where there is none.

    Raises:
        InputError: If it is not a JSON object.
    """
    file = directory / TOKENIZER_CONFIG
    try:
        # not by read_json: chat templates may hold what JSON only tolerates
        value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: expected a JSON object, got something else ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected a JSON object, got a {type(value).__name__}; fetch it again")
    return value


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
