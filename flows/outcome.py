"""How a study's outcome is shown."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table


def as_table(title: str, rows: Sequence[Sequence[str]]) -> Table:
    """Return a table of text: a header, then rows; the first column is a name, the others numbers at the right."""
    heading, *body = rows
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for number, name in enumerate(heading):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in body:
        table.add_row(*row)
    return table


def show(made: Any, run_id: str) -> None:
    """Print a `studies.run.Report`: tables, notes, conclusion, where the files and the MLflow run are."""
    tables = [as_table(title, rows) for title, rows in made.tables.items()]
    console = Console()
    # a broken line is worse to read than a long one, and a figure cut off is no figure
    console.width = max(console.width, 92, *(_width(console, table) for table in tables))
    console.print(*tables)
    console.print(*made.notes, *made.conclusion, sep="\n", highlight=False)
    console.print(*(f"wrote  {file}" for file in made.files), f"MLflow run  {run_id}", sep="\n", highlight=False)


def _width(console: Console, table: Table) -> int:
    """Return how wide the table wants to be, however narrow the terminal is."""
    return console.measure(table, options=console.options.update(width=1000)).maximum
