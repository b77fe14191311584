"""A tokenizer as llama.cpp reads it from a GGUF file.

llama.cpp does not read patterns from the file: it knows pre-tokenizers by name. The name is chosen from what the
tokenizer does, not from whose it is.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nirvana.errors import InputError

_LOG = logging.getLogger(__name__)
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_THREE_DIGITS, _ONE_DIGIT = _WORDS + r"\p{N}{1,3}" + _REST, _WORDS + r"\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (kinds of the steps, the pattern of a Split, whether whole words skip the merges) -> llama.cpp's name.
# Source: the patterns in llama.cpp's llama-vocab.cpp, where each name stands for its regular expressions.
_PRE_TOKENIZERS = {
    (("ByteLevel",), None, False): "gpt-2",
    (("Digits", "ByteLevel"), None, False): "smollm",
    (("Split", "ByteLevel"), _THREE_DIGITS, True): "llama-bpe",
    (("Split", "ByteLevel"), _THREE_DIGITS, False): "dbrx",
    (("Split", "ByteLevel"), _ONE_DIGIT, False): "stablelm2",
    (("Split", "ByteLevel"), _CASED, True): "tekken",
}


@dataclass(frozen=True)
class GgufTokenizer:
    """Vocabulary, merges and special tokens in GGUF's terms."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    """Of byte-level BPE; empty for a sentencepiece model."""
    scores: list[float]
    """Of a sentencepiece model; empty for byte-level BPE."""
    special: Mapping[str, int]
    """Token ids by role: bos, eos, unk, pad."""
    add_bos: bool
    add_eos: bool
    space_prefix: bool
    chat_template: str | None

    def add_to(self, writer: Any) -> None:
        """Write the keys into a GGUF file that is being made."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
        for role, token in self.special.items():
            getattr(writer, f"add_{role}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.space_prefix)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def describe_tokenizer(tokenizer: Any, vocab_size: int) -> GgufTokenizer:
    """Return a transformers tokenizer in GGUF's terms.

    Args:
        tokenizer: A fast tokenizer.
        vocab_size: Rows of the embedding: llama.cpp wants a token for each.

    Raises:
        InputError: If it is no BPE tokenizer, or has more tokens than the model.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    description = json.loads(backend.to_str()) if backend is not None else {"model": {"type": "none"}}
    bpe = description["model"]
    if bpe["type"] != "BPE":
        raise InputError(
            f"gguf: expected a BPE tokenizer (tokenizer.json), got one of type {bpe['type']}; use --to hf, uniform or "
            "padded"
        )
    tokens, types = _tokens(description, vocab_size)
    pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in bpe["merges"]]
    shared: dict[str, Any] = {
        "tokens": tokens,
        "types": types,
        "special": _special(tokenizer, vocab_size),
        "chat_template": tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
        **_additions(tokenizer),
    }
    from gguf.vocab import BpeVocab, LlamaHfVocab

    if bpe.get("byte_fallback"):
        return GgufTokenizer(
            model=LlamaHfVocab.tokenizer_model,
            pre="default",
            merges=[],
            scores=_scores(tokens, pairs),
            space_prefix=_prepends_space(description),
            **shared,
        )
    return GgufTokenizer(
        model=BpeVocab.tokenizer_model,
        pre=_pre_tokenizer(description),
        # a blank inside a piece would read as the border between two
        merges=[" ".join(part.replace(" ", "Ġ") for part in pair) for pair in pairs],
        scores=[],
        space_prefix=False,
        **shared,
    )


def _tokens(description: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Return the text and the type of every id; ids that no token has are unused."""
    from gguf import TokenType

    names = dict(description["model"]["vocab"]) | {t["content"]: t["id"] for t in description["added_tokens"]}
    largest = max(names.values(), default=-1)
    if largest >= vocab_size:
        raise InputError(
            f"gguf: expected a tokenizer of at most {vocab_size} tokens, got ids up to {largest}; "
            "the tokenizer does not belong to this model"
        )
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    byte_fallback = bool(description["model"].get("byte_fallback"))
    for token, number in names.items():
        is_byte = byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        tokens[number], types[number] = token, int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for added in description["added_tokens"]:
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    unknown = names.get(description["model"].get("unk_token"))
    if byte_fallback and unknown is not None:
        types[unknown] = int(TokenType.UNKNOWN)
    return tokens, types


def _special(tokenizer: Any, vocab_size: int) -> dict[str, int]:
    found = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "unk", "pad")}
    return {role: token for role, token in found.items() if token is not None and token < vocab_size}


def _additions(tokenizer: Any) -> dict[str, bool]:
    """Return whether the tokenizer itself puts BOS before and EOS behind a text."""
    with_special, without = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
    added = len(with_special) > len(without)
    return {
        "add_bos": added and with_special[0] == tokenizer.bos_token_id,
        "add_eos": added and with_special[-1] == tokenizer.eos_token_id,
    }


def _pre_tokenizer(description: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for how the text is cut before the merges."""
    step = description.get("pre_tokenizer") or {"type": "none"}
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    pattern = next((s["pattern"].get("Regex") for s in steps if s["type"] == "Split"), None)
    plain = not any(s.get("add_prefix_space") for s in steps) and description.get("normalizer") is None
    key = (tuple(s["type"] for s in steps), pattern, bool(description["model"].get("ignore_merges")))
    if plain and key in _PRE_TOKENIZERS:
        return _PRE_TOKENIZERS[key]
    _LOG.warning(
        "llama.cpp may cut this text into other tokens: its pre-tokenizer is none of %s; 'default' is written",
        ", ".join(sorted(_PRE_TOKENIZERS.values())),
    )
    return "default"


def _scores(tokens: list[str], pairs: list[tuple[str, ...]]) -> list[float]:
    """Return scores that make llama.cpp merge in the tokenizer's order: the earlier a piece arises, the higher."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(token, len(pairs)) + 1) for token in tokens]


def _prepends_space(description: Mapping[str, Any]) -> bool:
    """Tell whether a blank is put before the text."""
    normalizer = description.get("normalizer") or {}
    steps = [*normalizer.get("normalizers", [normalizer]), description.get("pre_tokenizer") or {}]
    return any(s.get("type") == "Prepend" or s.get("prepend_scheme") in ("first", "always") for s in steps)
