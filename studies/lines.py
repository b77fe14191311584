"""From rows to lines: each variant's mean over seeds, held against a reference, as a spec's table says.

A column is `name` (the value of a row), `name: KIND of FIELD`, or `name, low, high: KIND of FIELD` with a kind of
`KINDS`. Intervals are paired: over windows of the evaluation text for losses, over sequences of the held-out text for
divergences.
"""

import csv
import math
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nirvana.errors import InputError
from nirvana.files import atomic_file
from studies.bootstrap import paired_bootstrap, two_way_bootstrap
from studies.measure import UNREACHABLE
from studies.variants import DENSE, called

Rows = Sequence[Mapping[str, Any]]
Line = dict[str, Any]
BUDGET_SLACK = 0.005
"""A row further from the ratio asked for is marked: it is of another size than those that it stands beside."""
REFERENCE = "is_reference"
"""Key of a line: whether the others are held against it."""


class Group(NamedTuple):
    """Rows of one variant, a seed each, and those that it is held against."""

    members: Rows
    reference: Rows
    dense: Rows


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """Return a value by its path, `modules.mlp.kept`; None where there is none."""
    found: Any = row
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _value(group: Group, name: str) -> Any:
    values = [value_at(row, name) for row in group.members]
    if len(values) == 1 or not all(isinstance(value, int | float) for value in values):
        return values[0]
    mean = float(np.mean(values))
    return round(mean) if all(isinstance(value, int) for value in values) else mean


def matrix(rows: Rows, name: str) -> NDArray[np.float64]:
    """Return one value a model and window, or sequence: `[models, windows]`, in the order of the seeds."""
    return np.array([row[name] for row in sorted(rows, key=lambda row: row.get("seed", 0))], dtype=np.float64)


def perplexity(losses: NDArray[np.float64]) -> float:
    """Return exp of the mean of losses."""
    return math.exp(min(float(losses.mean()), 700.0))


def _means(rows: Rows, name: str) -> NDArray[np.float64]:
    return matrix(rows, name).mean(axis=0)


def _between_models(group: Group, name: str) -> Any:
    a, b = matrix(group.members, name), matrix(group.reference, name)
    return paired_bootstrap(a[0], b[0]) if len(a) == 1 else two_way_bootstrap(a - b)


def _gain(group: Group, before: str, after: str) -> Any:
    return paired_bootstrap(_means(group.members, before), _means(group.members, after))


KINDS: dict[str, Callable[[Group, str], Any]] = {
    "value": _value,
    "number": lambda group, _: len(group.members),
    "mean": lambda group, name: float(matrix(group.members, name).mean()),
    "perplexity": lambda group, name: perplexity(_means(group.members, name)),
    # less the reference's, with its 95 % interval
    "difference": lambda group, name: paired_bootstrap(_means(group.members, name), _means(group.reference, name)),
    # likewise, each model less the reference of its own seed
    "difference between models": _between_models,
    "increase": lambda group, name: float((matrix(group.members, name) - matrix(group.dense, name)).mean()),
    "gain": lambda group, names: _gain(group, *names.split(" to ")),
    "off the budget": lambda group, name: any(abs(row[name] - row["ratio"]) > BUDGET_SLACK for row in group.members),
}


def columns_of(table: Mapping[str, Any]) -> list[tuple[list[str], str, str]]:
    """Return each column's names, kind and field."""
    found = []
    for column in table["columns"]:
        pairs = column.items() if isinstance(column, Mapping) else [(each, "") for each in column.split(", ")]
        for names, how in pairs:
            kind, _, field = how.partition(" of ")
            found.append((names.split(", "), kind or "value", field or names))
    return found


def names_of(table: Mapping[str, Any]) -> list[str]:
    """Return the header of a table's CSV file."""
    return [name for names, _, _ in columns_of(table) for name in names]


def lines_of(rows: Rows, table: Mapping[str, Any]) -> list[Line]:
    """Return a line a variant, in the order of the rows unless the table sorts them.

    Args:
        rows: Of `studies.measure`.
        table: Of a spec: `names` tell variants apart; `reference` names the one that others with the same `within` are
            held against, and `otherwise` what is where there is none: `itself` or the `first`.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    names = table["names"]
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in names), []).append(row)
    every = list(groups.values())
    wanted = reference_of(rows, table.get("reference", {}))
    lines = [_line(members, every, wanted, table) for members in every]
    lines = [line for line in lines if UNREACHABLE not in line or UNREACHABLE in names_of(table)]
    return sorted(lines, key=lambda line: [line[name] for name in table["sort"]]) if "sort" in table else lines


def listed(lines: Sequence[Line], table: Mapping[str, Any]) -> list[Line]:
    """Return the lines that a table shows: `dense: false` leaves the dense model out."""
    return [line for line in lines if table.get("dense", True) or line.get("method") != DENSE]


def reference_of(rows: Rows, wanted: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what names the reference: as asked for if a row has it, else the first pruned one's values of the same."""
    if any(_has(row, wanted) for row in rows):
        return wanted
    first = next((row for row in rows if row["method"] != DENSE), rows[0])
    return {name: first.get(name) for name in wanted}


def _has(row: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(row.get(name) == value for name, value in wanted.items())


def _is_reached(members: Rows) -> bool:
    return not any(UNREACHABLE in row for row in members)


def _line(members: Rows, every: Sequence[Rows], wanted: Mapping[str, Any], table: Mapping[str, Any]) -> Line:
    first = members[0]
    line = {name: first.get(name) for name in (*table["names"], "method", "ratio", "compensation") if name in first}
    line["called"] = called(first["method"], first.get("compensation", "none"))
    if not _is_reached(members):
        return line | {UNREACHABLE: next(row[UNREACHABLE] for row in members if UNREACHABLE in row)}
    reached = [each for each in every if _is_reached(each)]
    same = {name: first.get(name) for name in table.get("within", ())}
    found = [each for each in reached if _has(each[0], wanted) and (wanted or each[0]["method"] != DENSE)]
    reference = next((each for each in found if _has(each[0], same)), None)
    if reference is None:
        is_first = table.get("otherwise") == "first" and found
        reference = min(found, key=lambda each: each[0]["ratio"]) if is_first else members
    alike = {name: first.get(name) for name in table.get("dense_within", ())}
    dense = next((each for each in reached if each[0]["method"] == DENSE and _has(each[0], alike)), members)
    line[REFERENCE] = reference is members
    for names, kind, field in columns_of(table):
        if kind not in KINDS:
            raise InputError(f"expected a kind of column of {', '.join(KINDS)}, got {kind}; correct the spec")
        missing = any(value_at(row, name) is None for row in members for name in field.split(" to "))
        if names == [UNREACHABLE] or (missing and kind not in ("value", "number")):
            continue
        value = KINDS[kind](Group(members, reference, dense), field)
        line |= dict(zip(names, value if len(names) > 1 else [value], strict=True))
    return line


# --- for a reader and for programs --------------------------------------------------------------------------------


class Words(string.Formatter):
    """Templates of specs: a value that is not there is nothing, a very large number is short."""

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return None for a name that a line does not have."""
        return kwargs.get(str(key))

    def format_field(self, value: Any, format_spec: str) -> str:
        """Write None as nothing."""
        if value is None or isinstance(value, str):
            return value or ""
        if format_spec.endswith(".2f") and abs(value) >= 1e4:
            format_spec = format_spec.replace(".2f", ".2e")
        return format(value, format_spec)


def worded(template: str, line: Mapping[str, Any]) -> str:
    """Fill a template with a line's values."""
    return Words().vformat(template, (), line).strip()


def shown(lines: Sequence[Line], table: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """Return by title the lines as text: a header, then one row each; lines of one title are one table."""
    how = table["shown"]
    differences = {name for names, kind, _ in columns_of(table) if kind.startswith("difference") for name in names}
    result: dict[str, list[list[str]]] = {}
    for line in lines:
        rows = result.setdefault(worded(how["title"], line), [list(how["columns"])])
        rows.append([_cell(template, line, differences) for template in how["columns"].values()])
    return result


def _cell(template: str, line: Line, differences: Iterable[str]) -> str:
    fields = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    if line.get(REFERENCE) and any(name in differences for name in fields):
        return "the reference"
    if fields and isinstance(line.get(fields[0]), str) and len(fields) == 3:  # undefined, and so is its interval
        return str(line[fields[0]])
    return worded(template, line) if any(line.get(name) is not None for name in fields) else ""


def write_csv(lines: Sequence[Mapping[str, Any]], columns: Sequence[str], path: Path) -> Path:
    """Write lines as CSV, not rounded; what a line does not have is left empty."""
    if not lines:
        raise InputError(f"{path}: expected measurements, got none; ask for at least one ratio")
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return path
