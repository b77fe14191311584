"""`python -m studies.results`: the tables of docs/*.md, rendered from docs/results/*.csv and their index.

A page marks the place of a table by two comments, `<!-- table NAME -->` and `<!-- end of table -->`. Between them stand
the command, model and text of the index and the rows of NAME.csv. Figures change in the CSV file alone; `--render` then
writes the pages, and without it the exit status is 1 when a page is not what its files say.
"""

import argparse
import csv
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from nirvana.errors import InputError

DOCS = Path(__file__).resolve().parents[1] / "docs"
_BLOCK = re.compile(r"<!-- table (\w+) -->\n.*?<!-- end of table -->", re.DOTALL)
_NUMBER = re.compile(r"-?\d[^a-z]*")
"""Cell of a number with its interval, unit or mark, and without words."""


@dataclass(frozen=True)
class Table:
    """Rows of one CSV file, and what the index says of them."""

    title: str
    command: str | None
    """Command that computes the rows; None where the script was not kept."""
    model: str
    tokens: str
    """Text and number of tokens or items on which the figures were measured."""
    machine: str
    duration: str | None
    rows: Sequence[Sequence[str]]
    """Cells as they are shown; the first row is the header."""


def read_tables(folder: Path) -> dict[str, Table]:
    """Return every table of a folder by name.

    Args:
        folder: Directory of `index.yaml` and one CSV file for each of its entries.

    Raises:
        InputError: If entries and CSV files differ, or a row is not as long as the header.
    """
    index = yaml.safe_load((folder / "index.yaml").read_text(encoding="utf-8"))
    names, files = set(index["tables"]), {file.stem for file in folder.glob("*.csv")}
    if names != files:
        raise InputError(f"{folder}: expected a CSV file for each entry of index.yaml, {sorted(names ^ files)} differ")
    tables = {}
    for name, entry in index["tables"].items():
        with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        if len({len(row) for row in rows}) != 1:
            raise InputError(f"{folder / name}.csv: expected rows as long as the header; correct the file")
        tables[name] = Table(**{**index["defaults"], **entry}, rows=rows)
    return tables


def as_markdown(table: Table) -> str:
    """Return the line on where a table comes from, and its rows; columns of numbers are aligned right."""
    source = f"`{table.command}`" if table.command else "script not kept"
    facts = " · ".join(fact for fact in (source, table.model, table.tokens, table.duration) if fact)
    header, *body = table.rows
    numbers = [all(_NUMBER.fullmatch(cell) for cell in column if cell) for column in zip(*body, strict=True)]
    rows = [header, ["---:" if each else "---" for each in numbers], *body]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([f"*{table.title}.* {facts}", "", *lines])


def rendered(page: str, tables: Mapping[str, Table]) -> str:
    """Return a page with each of its tables as the files have it.

    Raises:
        InputError: If the page names a table that is not there.
    """

    def block(match: re.Match[str]) -> str:
        name = match[1]
        if name not in tables:
            raise InputError(f"docs: expected one of the tables {', '.join(tables)}, got {name!r}; correct the page")
        return f"<!-- table {name} -->\n{as_markdown(tables[name])}\n<!-- end of table -->"

    return _BLOCK.sub(block, page)


def main(arguments: Sequence[str] | None = None) -> int:
    """Render the pages of docs/, or say which are not up to date.

    Returns:
        Exit status: 1 if a page differs from its files and was not to be rendered.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="write the pages that are not up to date")
    render = parser.parse_args(arguments).render
    tables = read_tables(DOCS / "results")
    stale = {}
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (new := rendered(text, tables)) != text:
            stale[page] = new
    for page, text in stale.items():
        if render:
            page.write_text(text, encoding="utf-8")
        print(f"{page}: {'rendered' if render else 'differs from docs/results/; python -m studies.results --render'}")
    return 1 if stale and not render else 0


if __name__ == "__main__":
    sys.exit(main())
