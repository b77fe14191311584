"""A study from its spec: measure, tell, draw, record. `flows.study` makes a step of each of these."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies.lines import Line, Rows, lines_of, listed, names_of, shown, write_csv
from studies.measure import UNREACHABLE
from studies.picture import draw
from studies.spec import Spec, resolve
from studies.subject import Subject
from studies.tracking import Series, record_study
from studies.words import series_of, verdict

REPORTS = Path("reports/studies")


@dataclass(frozen=True)
class Measured:
    """Rows, and what is told and recorded beside them; all of it JSON could hold."""

    rows: Rows
    parameters: Mapping[str, Any]
    notes: Sequence[str]


@dataclass(frozen=True)
class Report:
    """What came out."""

    tables: Mapping[str, Sequence[Sequence[str]]]
    """Text by title: a header, then rows."""
    conclusion: Sequence[str]
    files: Sequence[Path]
    children: Mapping[str, Sequence[Series]]
    notes: Sequence[str]


def measure(spec: Spec, subject: Subject, values: Mapping[str, Any]) -> Measured:
    """Return the rows of a study; what an earlier run finished is not computed again."""
    rows = resolve(spec.measure)(subject, spec, values)
    return Measured(rows, dict(values) | subject.parameters, [*spec.notes, *subject.notes])


def report(spec: Spec, measured: Measured, values: Mapping[str, Any]) -> Report:
    """Write tables and picture; return them with what they say."""
    lines = tables_of(spec, measured.rows, values)
    written = draw(spec.picture, lines, spec.name, REPORTS / f"{spec.name}.png")
    text: dict[str, Sequence[Sequence[str]]] = {}
    for table in spec.tables:
        name = table.get("name", "")
        mine = listed(lines[name], table)
        if table.get("optional") and not mine:
            continue
        file = REPORTS / f"{spec.name}{f'_{name}' if name else ''}.csv"
        written.append(write_csv(mine, names_of(table), file))
        text |= shown(mine, table) if "shown" in table else {}
    conclusion = [
        sentence
        for how in spec.verdict
        for sentence in (
            resolve(how["says"])(lines, measured.rows, values)
            if ":" in how["says"] and "group" not in how
            else verdict(lines[how.get("table", "")], how)
        )
    ]
    children: dict[str, list[Series]] = {}
    for how in spec.series:
        table = next(each for each in spec.tables if each.get("name", "") == how.get("table", ""))
        for child, series in series_of(listed(lines[how.get("table", "")], table), how).items():
            children.setdefault(child, []).extend(series)
    reasons = {line[UNREACHABLE] for each in lines.values() for line in each if line.get(UNREACHABLE)}
    reasons |= {row[UNREACHABLE] for row in measured.rows if UNREACHABLE in row}
    return Report(text, conclusion, written, children, [*measured.notes, *sorted(reasons)])


def tables_of(spec: Spec, rows: Rows, values: Mapping[str, Any]) -> dict[str, list[Line]]:
    """Return lines by table: of the engine, or of the table's own function, then changed by those it names."""
    found: dict[str, list[Line]] = {}
    for table in spec.tables:
        lines = resolve(table["made_by"])(rows, values) if "made_by" in table else lines_of(rows, table)
        for function in table.get("then", ()):
            lines = resolve(function)(lines, rows, values)
        found[table.get("name", "")] = list(lines)
    return found


def record(spec: Spec, measured: Measured, made: Report) -> str:
    """Record a study in MLflow, a child a variant; return the parent's run id."""
    conclusion = "\n\n".join(made.conclusion)
    return record_study(spec.name, measured.parameters, made.children, made.files, conclusion)
