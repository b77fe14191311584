"""How a text is written: with words apart or not, in English or another language; its sentences, and how long they are.

English keeps rules of its own, which its lists and figures rest on. Other languages are told by their letters alone.
"""

import re
import unicodedata
from enum import Enum

_ENGLISH = frozenset(["the", "of", "and", "to"])
_ENGLISH_SHARE = 0.03  # of the words; 12 to 20 % in prose, under 2 % in any other language that has words like these
_UNSPACED_SHARE = 0.3  # of what is no white space
_SAMPLE = 20_000  # characters that are looked at

HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
KATAKANA = "\u30a1-\u30fa\u30fc"
_JAPANESE = f"\u3041-\u309f{KATAKANA}"
SOUTHEAST_ASIAN = "\u0e01-\u0e4e\u0e81-\u0ecd\u1000-\u103f\u1780-\u17d3"
"""Thai, Lao, Burmese, Khmer."""
_CHINESE_OR_JAPANESE = re.compile(f"[{HAN}{_JAPANESE}]")
_SOUTHEAST_ASIAN = re.compile(f"[{SOUTHEAST_ASIAN}]")

# two letters before the stop: initials and most abbreviations end no sentence; WikiText has a space before the stop
_ENGLISH_END = re.compile(r"(?:(?<=[a-z]{2}[.!?])|(?<=[a-z]{2} [.!?]))\s+(?=[A-Z])")
LETTER = r"[^\s\d!-@\[-`{-~\u00a1-\u00bf\u2010-\u205e\u0964\u061f\u06d4\u060c]"
"""A letter or a mark upon one, in any script: no space, digit or punctuation."""
STOPS = ".!?…\u0964\u061f\u06d4"
"""Also of Devanagari, Arabic and Urdu."""
_END = re.compile(rf"(?<={LETTER}{LETTER}[{STOPS}])\s+")
_UNSPACED_END = re.compile(r"(?<=[。！？!?…])(?![。！？!?…」』”’）)])|(?<=[。！？!?…][」』”’）)])")
_INNER_SPACE = re.compile(f"(?<=[{HAN}{_JAPANESE}、。，！？]) (?=[{HAN}{_JAPANESE}「『])")
_WORDS_A_CHARACTER = 0.6


class Writing(Enum):
    """Ways of writing that items are made from by rules of their own."""

    ENGLISH = "English"
    SPACED = "words apart"
    CHINESE_OR_JAPANESE = "Chinese or Japanese"
    SOUTHEAST_ASIAN = "spaces between phrases"

    @classmethod
    def of(cls, text: str) -> "Writing":
        """Return how a text is written, by its beginning."""
        sample = text[:_SAMPLE]
        characters = len("".join(sample.split())) or 1
        if len(_CHINESE_OR_JAPANESE.findall(sample)) > _UNSPACED_SHARE * characters:
            return cls.CHINESE_OR_JAPANESE
        if len(_SOUTHEAST_ASIAN.findall(sample)) > _UNSPACED_SHARE * characters:
            return cls.SOUTHEAST_ASIAN
        words = re.findall(r"\w+", sample.lower())
        english = sum(word in _ENGLISH for word in words)
        return cls.ENGLISH if english >= _ENGLISH_SHARE * len(words) else cls.SPACED

    @property
    def spaced(self) -> bool:
        """Whether spaces stand between words."""
        return self in (Writing.ENGLISH, Writing.SPACED)

    @property
    def joint(self) -> str:
        """What stands between sentences."""
        return "" if self is Writing.CHINESE_OR_JAPANESE else " "

    def sentences(self, text: str) -> list[str]:
        """Split a text into sentences, or phrases where only these are told apart; line breaks become spaces."""
        line = " ".join(text.split())
        match self:
            case Writing.ENGLISH:
                return _ENGLISH_END.split(line)
            case Writing.CHINESE_OR_JAPANESE:
                return [part for each in _UNSPACED_END.split(_INNER_SPACE.sub("", line)) if (part := each.strip())]
            case Writing.SOUTHEAST_ASIAN:
                return line.split(" ")
        sentences, begin = [], 0
        for match in _END.finditer(line):
            # a lower-case letter goes on with the sentence; two capitals before the stop are an abbreviation
            following = next((character for character in line[match.end() :][:8] if character.isalpha()), "")
            if not following.islower() and not line[match.start() - 2].isupper():
                sentences.append(line[begin : match.start()])
                begin = match.end()
        return [*sentences, line[begin:]]

    def words(self, text: str) -> float:
        """Return how many words a text has; an estimate by its characters where they are not told apart."""
        return len(text.split()) if self.spaced else _WORDS_A_CHARACTER * len(text)


def is_word(text: str) -> bool:
    """Tell whether a text is letters and marks upon them, the first one a letter."""
    return text[:1].isalpha() and all(each.isalpha() or unicodedata.category(each)[0] == "M" for each in text)


def ends_unspaced(text: str) -> bool:
    """Tell whether a text ends with a character of a script that puts no spaces between words."""
    last = text[-1:]
    return bool(_CHINESE_OR_JAPANESE.match(last) or _SOUTHEAST_ASIAN.match(last))
