"""What a study ends in, and how it is shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Outcome:
    """What a study ends in.

    Attributes:
        tables: Printed first.
        conclusion: Sentences; the first is the flow's message.
        files: What was written.
        run_id: Of the MLflow parent.
        notes: Lines under the tables.
    """

    tables: Sequence[Table]
    conclusion: Sequence[str]
    files: Sequence[Path]
    run_id: str
    notes: Sequence[str] = ()


def as_table(title: str, rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> Table:
    """Return a table of text: a header, then the rows.

    Args:
        title: Above it.
        rows: The first is the header.
        left: Columns that are names; the others are numbers, at the right.
    """
    heading, *body = rows
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for number, name in enumerate(heading):
        table.add_column(name, justify="left" if number in left else "right", no_wrap=True)
    for row in body:
        table.add_row(*row)
    return table


def show(outcome: Outcome) -> None:
    """Print it."""
    console = Console()
    # a broken line is worse to read than a long one, and a figure cut off is no figure
    console.width = max(console.width, 92, *(_width(console, table) for table in outcome.tables))
    console.print(*outcome.tables)
    console.print(*outcome.notes, *outcome.conclusion, sep="\n", highlight=False)
    written = [f"wrote  {file}" for file in outcome.files]
    console.print(*written, f"MLflow run  {outcome.run_id}", sep="\n", highlight=False)


def _width(console: Console, table: Table) -> int:
    """Return how wide the table wants to be, however narrow the terminal is."""
    return console.measure(table, options=console.options.update(width=1000)).maximum
