"""Rows of JSON and CSV, one after the other, and the text in them."""

import csv
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import IO, Any

from nirvana.errors import InputError

Row = tuple[str, Any]
"""Where a row stands in its file, and the row."""

_MOST_CHARACTERS = 1 << 28
"""Of a row, and of a file that has to be read as a whole."""
_BLOCK = 1 << 20
_SHOWN_COLUMNS = 10
_SHOWN_CHARACTERS = 40
_SEARCHED_ROWS = 10_000  # if none of them has the column, none will
_TOO_DEEP = "too many brackets within one another"
_LONGEST_TOKEN = 9  # -Infinity
_MOST_DIGITS = 4300
_MISSING = object()
_SURROGATE = re.compile("[\ud800-\udfff]")
_SEPARATORS = (",", "\t", ";", "|")


def texts(rows: Iterable[Row], field: str, name: str) -> Iterator[str]:
    """Take the text of rows; that of a row without any is empty.

    Args:
        rows: Of one file or dataset.
        field: The column of text. One whose name is the whole of `a.b` goes before field b of column a.
        name: What the rows are called in errors.

    Raises:
        InputError: If no row has the column, or one holds something else than text in it.
    """
    found, columns = False, dict[str, None]()
    for number, (where, row) in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(
                f"{name}, {where}: expected an object with a column {field!r}, got {_kind(row)}; correct it"
            )
        text = value_at(row, field)
        if text is _MISSING:
            if not found:
                columns |= dict.fromkeys(_columns(row))
                if number >= _SEARCHED_ROWS:
                    break
            yield ""
            continue
        found = True
        if text is not None and not isinstance(text, str):
            raise InputError(
                f"corpus.text_field: expected a column of text, {field!r} holds {_kind(text)} in {name}, {where}; "
                "choose another column or make it text"
            )
        yield _whole_characters(text or "")
    if columns and not found:
        ordered = sorted(columns)
        shown = ", ".join(map(_shortened, ordered[:_SHOWN_COLUMNS])) + (
            ", ..." if len(ordered) > _SHOWN_COLUMNS else ""
        )
        raise InputError(f"corpus.text_field: expected a column of {name}, got {field!r}; it has: {shown}")


def _shortened(column: str) -> str:
    """Return a column's name; where a file has no header, its first text stands there."""
    return column if len(column) <= _SHOWN_CHARACTERS else f"{column[:_SHOWN_CHARACTERS]}..."


def value_at(row: Any, field: str) -> Any:
    """Return what a row holds in a column, or in a field within one; `_MISSING` if it has none."""
    if not isinstance(row, dict):
        return _MISSING
    if field in row:
        return row[field]
    # a.b.c: column a.b may hold c
    for place in range(len(field) - 1, 0, -1):
        if field[place] == "." and field[:place] in row:
            inner = row[field[:place]]
            return None if inner is None else value_at(inner, field[place + 1 :])
    return _MISSING


def _columns(row: dict[str, Any]) -> Iterator[str]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from (f"{name}.{inner}" for inner in _columns(value))
        else:
            yield str(name)


def _kind(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        keys = list(value[0])[:4]
        talk = (
            ": a conversation, which is no text until its turns are joined" if {"role", "content"} & set(keys) else ""
        )
        return f"list of {{{', '.join(map(str, keys))}}}{talk}"
    return type(value).__name__


def _whole_characters(text: str) -> str:
    """Replace halves of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def json_rows(text: IO[str], field: str, name: str, may_name_rows: bool) -> Iterator[Row]:
    """Read the rows of a JSON file: its lines, the members of a list, the values of an object or of its columns.

    Args:
        text: The open file.
        field: The column of text: decides what an object is that stands alone.
        name: Of the file, for errors.
        may_name_rows: An object of objects is rows by name, if the column is none of its own.

    Raises:
        InputError: If it is not JSON, or a row is too long.
    """
    number, line = 0, ""
    while not line.strip():
        number += 1
        line = _line(text, name, number)
        if not line:
            return
    if line.lstrip().startswith("["):
        yield from _members(text, line, name)
        return
    first, problem = _first_value(line)
    if problem:
        raise InputError(f"{name}:{number}: cannot read the line as JSON ({problem}); correct it")
    if first is not _MISSING:
        for ahead in itertools.count(number + 1):
            next_line = _line(text, name, ahead)
            if next_line.strip() or not next_line:
                break
        if next_line:
            yield f"line {number}", first
            yield from _lines(text, next_line, name, ahead)
            return
        yield from _alone(first, field, may_name_rows)
        return
    whole = line + text.read(_MOST_CHARACTERS)
    if len(whole) >= _MOST_CHARACTERS:
        raise InputError(
            f"{name}: cannot read an object of more than {_MOST_CHARACTERS >> 20} Mi characters; write a row a line"
        )
    values = list(_values(whole, name))
    if len(values) == 1:
        yield from _alone(values[0], field, may_name_rows)
    else:
        yield from ((f"object {place}", value) for place, value in enumerate(values, start=1))


def _line(text: IO[str], name: str, number: int) -> str:
    line = text.readline(_MOST_CHARACTERS + 1)
    if len(line) > _MOST_CHARACTERS:
        raise InputError(
            f"{name}:{number}: expected a row of at most {_MOST_CHARACTERS >> 20} Mi characters, got a longer line; "
            "cut it into several"
        )
    return line


def _whole_number(digits: str) -> int | float:
    return int(digits) if len(digits) < _MOST_DIGITS else float(digits)  # Python reads no more of them


_DECODER = json.JSONDecoder(parse_int=_whole_number)


def _loads(text: str) -> Any:
    return _DECODER.decode(text)


def _first_value(line: str) -> tuple[Any, str]:
    """Return what a line says; `_MISSING` if that goes on in the next one, or why it says nothing."""
    try:
        return _loads(line), ""
    except RecursionError:
        return _MISSING, _TOO_DEEP
    except ValueError as error:
        return _MISSING, "" if _may_go_on(error, len(line.rstrip())) else str(error)


def _parsed(text: str) -> tuple[Any, str]:
    """Return the value that a text is; `_MISSING` if it is none, and why."""
    try:
        return _loads(text), ""
    except RecursionError:
        return _MISSING, _TOO_DEEP
    except ValueError as error:
        return _MISSING, str(error)


def _may_go_on(error: ValueError, length: int) -> bool:
    """Tell whether a text that is no JSON might be the beginning of some."""
    return isinstance(error, json.JSONDecodeError) and (
        error.msg.startswith("Unterminated string") or error.pos >= length - _LONGEST_TOKEN
    )


def _lines(text: IO[str], line: str, name: str, number: int) -> Iterator[Row]:
    while line:
        if line.strip():
            row, problem = _parsed(line)
            if row is _MISSING:
                raise InputError(
                    f"{name}:{number}: cannot read the line as JSON ({problem}); correct it or make the file whole"
                )
            yield f"line {number}", row
        number += 1
        line = _line(text, name, number)


def _alone(value: Any, field: str, may_name_rows: bool) -> Iterator[Row]:
    """Read an object that is a whole file."""
    at = value_at(value, field)
    named = isinstance(value, dict) and value and all(isinstance(row, dict) for row in value.values())
    columns = isinstance(at, dict) and field not in at and all(isinstance(each, str | None) for each in at.values())
    if may_name_rows and named and columns:  # as pandas writes a table
        yield from ((f"row {key!r}", {field: each}) for key, each in at.items())
    elif may_name_rows and named and not isinstance(at, str):
        yield from ((f"row {key!r}", row) for key, row in value.items())
    elif isinstance(at, list) and all(isinstance(each, str | None) for each in at):
        yield from ((f"row {place}", {field: each}) for place, each in enumerate(at, start=1))
    else:
        yield "row 1", value


def _values(text: str, name: str) -> Iterator[Any]:
    """Read one JSON value after another."""
    place = 0
    while True:
        while place < len(text) and text[place].isspace():
            place += 1
        if place == len(text):
            return
        try:
            value, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{name}: cannot read it as JSON ({error}); correct it or make the file whole") from None
        yield value


def _members(text: IO[str], held: str, name: str) -> Iterator[Row]:
    """Read the members of a list one by one; the file may be larger than memory."""
    place, number, block = held.index("[") + 1, 1, _BLOCK
    ended = False
    while True:
        while place < len(held) and (held[place].isspace() or held[place] == ","):
            place += 1
        if held[place : place + 1] == "]":
            return
        problem, cut_off = "", True
        try:
            if place < len(held):
                row, place = _DECODER.raw_decode(held, place)
                yield f"row {number}", row
                number, block = number + 1, _BLOCK
                continue
        except RecursionError:
            problem, cut_off = _TOO_DEEP, False
        except ValueError as error:
            problem, cut_off = str(error), _may_go_on(error, len(held))
        if ended or not cut_off or len(held) - place > _MOST_CHARACTERS:
            problem = problem or "the list has no end"
            raise InputError(f"{name}, row {number}: cannot read it as JSON ({problem}); correct it or make it whole")
        following = text.read(block)
        held, place, block, ended = held[place:] + following, 0, block * 2, not following


def csv_rows(text: IO[str], field: str, name: str, separator: str | None = None) -> Iterator[Row]:
    """Read the rows of a CSV file with a header, every value as the text that it is: `NA` and `null` too.

    Args:
        text: The open file, its line ends as they are.
        field: The column of text.
        name: Of the file, for errors.
        separator: None: that of , tab ; | by which the header has the column.

    Raises:
        InputError: If a row has more or fewer values than the header, or the column holds numbers.
    """
    header_line = text.readline(_BLOCK)
    separator = separator or next(
        (each for each in _SEPARATORS if field in next(csv.reader([header_line], delimiter=each), [])), ","
    )
    csv.field_size_limit(_MOST_CHARACTERS)  # of this process
    if "\0" in header_line:
        raise InputError(f"{name}: expected UTF-8 text, got bytes of another encoding or no text; convert it")
    try:
        # a header with line breaks within quotes goes on in the next lines
        reader = csv.reader(itertools.chain([header_line], text), delimiter=separator, strict=True)
        header = next(reader, None)
        if header is None:
            return
        rows = _csv_rows(reader, header, name)
        head = []
        for row in itertools.islice(rows, _SEARCHED_ROWS):
            head.append(row)
            if (value := row[1].get(field)) and _number(value) is None:
                break
        else:
            _refuse_numbers([value for _, row in head if (value := row.get(field))], field, name)
        yield from itertools.chain(head, rows)
    except csv.Error as error:
        raise InputError(
            f"{name}:{reader.line_num}: cannot read it as CSV ({error}); quotes within a value in quotes are doubled: "
            "correct the row"
        ) from None


def _csv_rows(reader: Any, header: list[str], name: str) -> Iterator[Row]:
    for values in reader:
        if not values:
            continue  # a blank line
        if len(values) > len(header):
            raise InputError(
                f"{name}:{reader.line_num}: expected {len(header)} values, as the header has, got {len(values)}; put "
                "text that holds separators or line breaks in quotes"
            )
        yield f"line {reader.line_num}", dict(zip(header, values, strict=False))


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _refuse_numbers(values: list[str], field: str, name: str) -> None:
    """Refuse a column of numbers, which another one was meant for; NaN and infinity may be words."""
    if any(math.isfinite(float(value)) for value in values):
        kind = "int" if all(value.strip().lstrip("+-").isdigit() for value in values) else "float"
        raise InputError(
            f"corpus.text_field: expected a column of text, {field!r} holds {kind} in {name}; choose another column"
        )
