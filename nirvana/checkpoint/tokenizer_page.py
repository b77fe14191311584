"""The page of text on which two tokenizers are compared: prose, and what tokenizers are known to disagree about."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nirvana.checkpoint.prose import PROSE

ORDINARY = ("In 1984, 12345 people lived there; by 2001 it was 1,234,567.", PROSE)
"""Text that any tokenizer of English is made for."""
HARD = (
    "",
    " ",
    "  two blanks before",
    "two blanks behind  ",
    "three   blanks   between",
    "tabs\tand\t\ttabs",
    "lines\n\n\nand\r\nlines\n",
    "naïve café, Straße, “quoted” — and …",
    "decomposed: e\u0301 n\u0303 A\u030a; ligature ﬁ, full width ＡＢＣ１２３",
    "日本語の文と English、한국어 문장, العربية, हिन्दी, русский текст, ภาษาไทย",
    "family 👩\u200d👩\u200d👧\u200d👦, flag 🏳️\u200d🌈, wave 👋🏽",
    "rare: 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ꙮ \u200b\u00a0.",
    "def f(x):\n\tif x >= 0:\n\t\treturn x ** 2  # it's squared\n    return {'a': [1, 2]}",
    "DON'T they'LL we've I'm; http://example.org/?q=1&b=%20",
    "▁Ġ<0x0A>",
)
_CONVERSATION = [{"role": "user", "content": "In 1984, 12345"}]


@dataclass(frozen=True)
class Difference:
    """The first text that two tokenizers read differently."""

    text: str
    expected: Any
    found: Any

    def line(self) -> str:
        """Return it in few words."""
        expected, found = self.expected, self.found
        if isinstance(expected, list) and isinstance(found, list):
            same = next((n for n, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), 0)
            counts = f" ({len(expected)} against {len(found)} tokens)"
            start = max(0, same - 1)
            return f"{_short(self.text)}: {_short(expected[start:])} against {_short(found[start:])}{counts}"
        return f"{_short(self.text)}: {_short(expected)} against {_short(found)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 48 else text[:45] + "..."


def ids(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """Return a text's token ids, with what the tokenizer puts around a text or without."""
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def first_difference(expected: Any, found: Any, page: tuple[str, ...]) -> Difference | None:
    """Return the first text of a page that two tokenizers read or write differently; None if there is none."""
    for text in page:
        for special in (True, False):
            before, after = ids(expected, text, special), ids(found, text, special)
            if before != after:
                return Difference(text, before, after)
        for skip in (True, False):
            said, says = (each.decode(before, skip_special_tokens=skip) for each in (expected, found))
            if said != says:
                return Difference(f"the text of {_short(before)}", said, says)
    return None


def every_difference(expected: Any, found: Any, more: tuple[str, ...] = ()) -> Iterator[Difference]:
    """Yield where two tokenizers differ: on the page and `more` text, in special tokens, templates and padding.

    Args:
        expected: The tokenizer that is right.
        found: The one that is compared with it.
        more: Texts beside the page of our own.
    """
    specials = tuple(f"a {token}b{token} c" for token in expected.all_special_tokens[:16])
    difference = first_difference(expected, found, (*ORDINARY, *HARD, *more, *specials))
    if difference is not None:
        yield difference
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "padding_side", "chat_template"):
        before, after = getattr(expected, name, None), getattr(found, name, None)
        if before != after:
            yield Difference(name, before, after)
    said, says = _conversation(expected), _conversation(found)
    if said != says:
        yield Difference("a conversation", said, says)


def _conversation(tokenizer: Any) -> Any:
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return tokenizer.apply_chat_template(_CONVERSATION, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may ask for other messages, or be broken in itself
        return type(error).__name__
