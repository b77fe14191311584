"""One tokenizer: whoever reads text for a model, dense, pruned or exported, reads the same ids.

`AutoTokenizer` chooses a class by the configuration's model type, also against tokenizer_config.json, and many classes
take from tokenizer.json the vocabulary only. Under the model type of a pruned model it would choose another one. So
what is written beside a pruned model is the dense model's tokenizer as it was loaded, whole, in tokenizer.json, under a
class name that reads the file as it stands; and it is compared with the dense one before it gets its name.
"""

import contextlib
import difflib
import logging
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nirvana.checkpoint.companions import LEGACY, TOKENIZER_CONFIG, copy_companions, has_tokenizer, tokenizer_config
from nirvana.checkpoint.tokenizer_page import ORDINARY, every_difference, first_difference, ids
from nirvana.errors import InputError
from nirvana.files import write_json

READING = "nirvana_reading"
"""Key of tokenizer_config.json that says which reading counts where two are possible: `file` or `class`."""
READINGS = ("file", "class")
_GENERIC = "PreTrainedTokenizerFast"
"""The name under which every release of transformers reads tokenizer.json as it stands."""
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_SAME_PIECES = 0.8
"""Least share of a page's pieces that a sentencepiece file and what is read from it have in common."""
_SAMPLE = 256
"""Tokens of the vocabulary that are written and read back."""


class TwoReadingsError(InputError):
    """Plain text is read in two ways, and nothing says which counts: see `nirvana.checkpoint.reading`."""

    def __init__(self, message: str, readings: dict[str, Any]):
        super().__init__(message)
        self.readings = readings
        """The tokenizers, by what `READING` would choose them: `file` and `class`."""


def read_tokenizer(directory: Path | str, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a model directory, once it is known to be whole.

    Args:
        directory: Dense or pruned model.
        trust_remote_code: Whether code in the directory may be run.

    Raises:
        InputError: If there is none that can be read, or it does not know its own tokens.
        TwoReadingsError: If transformers reads plain text otherwise than the tokenizer.json beside it, and nothing
            says which of the two counts.
    """
    directory = Path(directory)
    with _explained(directory):
        found = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
        found = _chosen(directory, found)
        _check_whole(directory, found)
    return found


def begins_with(tokenizer: Any) -> int | None:
    """Return the token that a tokenizer itself puts before a text, BOS for most that do; None if it puts none."""
    bare, dressed = ids(tokenizer, "a"), ids(tokenizer, "a", special=True)
    before = dressed[: dressed.index(bare[0])] if bare and bare[0] in dressed else dressed[: len(dressed) - len(bare)]
    return before[0] if before else None


def read_if_any(directory: Path) -> Any:
    """Return a model's tokenizer as `read_tokenizer`, or None if it has none."""
    return read_tokenizer(directory) if has_tokenizer(directory) else None


def write_tokenizer(tokenizer: Any, directory: Path, more: tuple[str, ...] = ()) -> None:
    """Make a model directory's tokenizer the given one.

    Args:
        tokenizer: The dense model's.
        directory: Holds config.json and the dense model's companions already.
        more: Texts to compare on beside the page of our own.

    Raises:
        InputError: If transformers reads other ids from the directory, whatever it is told.
    """
    kind = type(tokenizer).__name__
    if not isinstance(tokenizer, PreTrainedTokenizerFast):  # Python classes are found by their name everywhere
        _name_class(directory, tokenizer_config(directory), kind)
        check_same_ids(tokenizer, directory, more)
        return
    with _explained(directory):
        tokenizer.save_pretrained(directory)
    for name in LEGACY:  # said in tokenizer.json and tokenizer_config.json now; read once more, they could change it
        (directory / name).unlink(missing_ok=True)
    saved = tokenizer_config(directory) | {"padding_side": tokenizer.padding_side}
    names = dict.fromkeys((_GENERIC, kind.removesuffix("Fast").replace("TokenizersBackend", _GENERIC)))
    for number, name in enumerate(names):
        _name_class(directory, saved, name)
        try:
            check_same_ids(tokenizer, directory, more)
            break
        except InputError:
            if number + 1 == len(names):
                raise


def check_same_ids(dense: Any, written: Path, more: tuple[str, ...] = ()) -> None:
    """Compare the tokenizer of a written directory, loaded as a user loads it, with the dense model's.

    Args:
        dense: The dense model's tokenizer.
        written: A model directory.
        more: Texts to compare on beside the page of our own.

    Raises:
        InputError: If a text has other ids, or special tokens and templates differ.
    """
    with _explained(written):
        found = AutoTokenizer.from_pretrained(written, local_files_only=True, trust_remote_code=False)
        difference = next(every_difference(dense, found, more), None)
    if difference is not None:
        raise InputError(
            "tokenizer: expected the dense model's tokens of a page of text from the files written, transformers "
            f"reads others with {type(found).__name__}: {difference.line()}; nothing was written: where "
            "layers agree transformers takes a class of its own; allocation.scope: global, or an export to hf, is read "
            "as it stands"
        )


def carry(source: Path, target: Path, tokenizer: Any, more: tuple[str, ...] = ()) -> None:
    """Bring along what belongs to a model: its companions, and its tokenizer under the new configuration.

    Args:
        source: The model directory that is written anew.
        target: Holds config.json already.
        tokenizer: What the dense model reads text with; None if it has none.
        more: Texts to compare on beside the page of our own.

    Raises:
        InputError: If a file is a link to one that is not the model's, or the tokenizer cannot be had.
    """
    copy_companions(source, target)
    if tokenizer is not None:
        write_tokenizer(tokenizer, target, more)


def _name_class(directory: Path, config: dict[str, Any], name: str) -> None:
    left_out = ("auto_map", READING, "is_local", "local_files_only")
    kept = {key: value for key, value in config.items() if key not in left_out}
    write_json(directory / TOKENIZER_CONFIG, kept | {"tokenizer_class": name})


def _chosen(directory: Path, found: Any) -> Any:
    """Return the reading that counts: where a class rebuilds its rules, tokenizer.json may say something else."""
    rebuilt = isinstance(found, PreTrainedTokenizerFast) and type(found) is not PreTrainedTokenizerFast
    if not rebuilt or not (directory / "tokenizer.json").is_file():
        return found
    as_filed = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    asked = tokenizer_config(directory).get(READING)
    if asked is not None and asked not in READINGS:
        raise InputError(
            f"{directory / TOKENIZER_CONFIG}: {READING}: expected one of {', '.join(READINGS)}, got {asked!r}; "
            "choose one"
        )
    if asked is not None:
        return as_filed if asked == "file" else found
    difference = first_difference(as_filed, found, ORDINARY)
    if difference is None:
        return found
    raise TwoReadingsError(
        f"{directory}: expected one reading of plain text, got two: tokenizer.json as it stands and the class that "
        f"transformers takes for this model type, {type(found).__name__} ({difference.line()}); the model was trained "
        "with one of them: set model.tokenizer in params.yaml to file or class, or "
        f'"{READING}" in tokenizer_config.json',
        {"file": as_filed, "class": found},
    )


def _check_whole(directory: Path, tokenizer: Any) -> None:
    """Refuse a tokenizer that does not know its own tokens: a vocabulary file is missing, or read as another kind."""
    _check_pieces(directory, tokenizer)
    texts = _own_texts(tokenizer)
    known = sum(_letters(_read_back(tokenizer, text)) == _letters(text) for text in texts)
    told = _read_back(tokenizer, ORDINARY[0])
    glued = _letters(told) == _letters(ORDINARY[0]) and len(told.split()) < 5
    if texts and 2 * known >= len(texts) and not glued:
        return
    wanted = dict.fromkeys(name for name in getattr(tokenizer, "vocab_files_names", {}).values() if name)
    missing = [name for name in wanted if not (directory / name).is_file()]
    what = "loses the blanks between words" if glued else f"reads back {known} of {len(texts)} of its own tokens"
    raise InputError(
        f"{directory}: expected a whole tokenizer, got a {type(tokenizer).__name__} of {len(tokenizer)} tokens that "
        f"{what}; put the vocabulary file beside the model that belongs to it"
        + (f" (this class reads {' or '.join(wanted)}, missing: {', '.join(missing)})" if missing else "")
    )


def _check_pieces(directory: Path, tokenizer: Any) -> None:
    """Refuse a reading of a sentencepiece file that is not the file's: a class made for another kind of vocabulary.

    A blank before the first word is a matter of taste; other pieces are not.
    """
    files = [file for file in sorted(directory.glob("*.model")) if file.is_file()]
    if (directory / "tokenizer.json").is_file() or len(files) != 1:
        return
    try:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(files[0]))
    except (ImportError, OSError, RuntimeError):  # not installed, or a file of another kind (tiktoken)
        return
    found = tokenizer.convert_ids_to_tokens(ids(tokenizer, ORDINARY[1]))
    pieces = processor.encode(ORDINARY[1], out_type=str)
    if difflib.SequenceMatcher(None, pieces, found, autojunk=False).ratio() < _SAME_PIECES:
        raise InputError(
            f"{directory}: expected the pieces of {files[0].name}, transformers reads others with "
            f"{type(tokenizer).__name__} ({len(found)} against {len(pieces)} tokens of a page); put tokenizer.json "
            "beside the model, or name the tokenizer's own class in tokenizer_config.json"
        )


def _read_back(tokenizer: Any, text: str) -> str:
    return str(tokenizer.decode(ids(tokenizer, text), skip_special_tokens=True))


def _own_texts(tokenizer: Any) -> list[str]:
    special = {token for token, added in getattr(tokenizer, "added_tokens_decoder", {}).items() if added.special}
    special |= set(tokenizer.all_special_ids)
    tokens = sorted(set(tokenizer.get_vocab().values()) - special)
    texts = (tokenizer.decode([token]) for token in tokens[:: max(1, len(tokens) // _SAMPLE)])
    return [text for text in texts if _letters(text) and "\ufffd" not in text and not _BYTE.fullmatch(text)]


def _letters(text: str) -> str:
    """Return what survives any normaliser: letters and digits, composed, without case."""
    return "".join(c for c in unicodedata.normalize("NFKD", text).casefold() if c.isalnum())


@contextlib.contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """Turn what transformers makes of odd tokenizer files into one line; keep its own warnings quiet."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception: no common class
        cause = " ".join(str(error).split())[:200]
        raise InputError(
            f"{directory}: expected tokenizer files, transformers cannot read them ({cause}); "
            "put tokenizer.json and tokenizer_config.json beside the model"
        ) from error
    finally:
        logger.setLevel(level)
