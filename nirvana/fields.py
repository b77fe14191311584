"""Read the keys of JSON that somebody else wrote: each is checked for type and range as it is read."""

import math
import reprlib
from collections.abc import Collection
from typing import Any

from nirvana.errors import InputError

_LONGEST_TEXT = 200
_DEEPEST = 8

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxlevel = 2


def shortened(value: Any) -> str:
    """Return a value as one short printable piece of an error line."""
    return _short.repr(value)


class Fields:
    """A JSON object whose keys are read one at a time.

    Args:
        value: What the file has in this place.
        where: What errors call it, e.g. `sites[3]`.
        remedy: How errors end.

    Raises:
        InputError: If the value is no object; later, if a key is missing or its value is not what is asked for.
    """

    def __init__(self, value: Any, where: str, remedy: str):
        self.where, self._remedy = where, remedy
        if not isinstance(value, dict):
            raise self.refused("an object", value)
        self._value: dict[str, Any] = value

    def refused(self, expected: str, got: Any, key: str = "") -> InputError:
        """Return the error that says so."""
        return InputError(f"{self._name(key)}: expected {expected}, got {shortened(got)}; {self._remedy}")

    def _name(self, key: str) -> str:
        return ".".join(part for part in (self.where, key) if part)

    def raw(self, key: str) -> Any:
        """Return whatever stands at a key."""
        if key not in self._value:
            raise InputError(f"{self._name(key)}: expected a value, found none; {self._remedy}")
        return self._value[key]

    def keys(self) -> list[str]:
        """Return the names of its values."""
        return list(self._value)

    def whole(self, key: str, low: int, high: int) -> int:
        """Return a whole number of `low` to `high`; neither `true` nor 1.0 is one."""
        value = self.raw(key)
        if type(value) is not int or not low <= value <= high:
            raise self.refused(f"a whole number from {low} to {high}", value, key)
        return value

    def wholes(self, key: str, count: int, high: int) -> list[int]:
        """Return a list of `count` whole numbers of 0 to `high`."""
        value = self.raw(key)
        whole = isinstance(value, list) and all(type(each) is int and 0 <= each <= high for each in value)
        if not whole or len(value) != count:
            raise self.refused(f"{count} whole numbers from 0 to {high}", value, key)
        return list(value)

    def share(self, key: str) -> float:
        """Return a number of 0 to 1."""
        value = self.raw(key)
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise self.refused("a number from 0 to 1", value, key)
        return float(value)

    def above_zero(self, key: str, most: float) -> float:
        """Return a number above 0, at most `most`."""
        value = self.raw(key)
        if type(value) not in (int, float) or not 0 < value <= most:
            raise self.refused(f"a number above 0, at most {most:g}", value, key)
        return float(value)

    def text(self, key: str) -> str:
        """Return a line of text that is safe to print."""
        value = self.raw(key)
        if not isinstance(value, str) or not value.isprintable() or not 1 <= len(value) <= _LONGEST_TEXT:
            raise self.refused(f"1 to {_LONGEST_TEXT} printable characters", value, key)
        return value

    def choice(self, key: str, choices: Collection[str]) -> str:
        """Return one of the given texts."""
        value = self.raw(key)
        if not isinstance(value, str) or value not in choices:
            raise self.refused(f"one of {', '.join(choices)}", value, key)
        return value

    def inner(self, key: str) -> "Fields":
        """Return the object that stands at a key."""
        return Fields(self.raw(key), self._name(key), self._remedy)

    def inner_or_none(self, key: str) -> "Fields | None":
        """Return the object that stands at a key; None where null does, or nothing."""
        return None if self._value.get(key) is None else self.inner(key)

    def list_of(self, key: str) -> list["Fields"]:
        """Return the objects of a list with at least one."""
        value = self.raw(key)
        if not isinstance(value, list) or not value:
            raise self.refused("a list that is not empty", value, key)
        return [Fields(item, f"{self._name(key)}[{number}]", self._remedy) for number, item in enumerate(value)]

    def free(self, key: str) -> dict[str, Any]:
        """Return an object of any keys, of which it is only sure that it can be written as JSON again."""
        value = self.raw(key)
        if not isinstance(value, dict) or not _is_writable(value, _DEEPEST):
            raise self.refused(f"an object of finite numbers and text, at most {_DEEPEST} levels deep", value, key)
        return value


def _is_writable(value: Any, levels: int) -> bool:
    """Tell whether strict JSON in UTF-8 can hold a value that lenient JSON held: no NaN, no half of a character."""
    if isinstance(value, dict):
        return levels > 0 and all(_is_writable(key, 0) and _is_writable(v, levels - 1) for key, v in value.items())
    if isinstance(value, list):
        return levels > 0 and all(_is_writable(item, levels - 1) for item in value)
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    return not isinstance(value, float) or math.isfinite(value)
