"""Rows of parquet and Arrow files: of all their columns only the text's is read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.corpus.text_rows import Row

_ROWS = 256  # at a time


def parquet_rows(file: Path, field: str) -> Iterator[Row]:
    """Read the column of text of a parquet file; all columns' names if it has no such column."""
    from pyarrow import parquet

    with parquet.ParquetFile(file) as opened:
        names = opened.schema_arrow.names
        # of a.b only b of a is read
        wanted = [field] if field in names else [path for path in _paths(opened) if f"{path}.".startswith(f"{field}.")]
        if not wanted:
            yield "schema", dict.fromkeys(_paths(opened))
            return
        place = 0
        for batch in opened.iter_batches(_ROWS, columns=wanted):
            for row in batch.to_pylist():
                place += 1
                yield f"row {place}", row


def _paths(opened: Any) -> list[str]:
    return [opened.schema.column(place).path for place in range(len(opened.schema))]


def arrow_rows(file: Path, field: str) -> Iterator[Row]:
    """Read the rows of an Arrow file: a stream, as `datasets` writes it, or the file format."""
    import pyarrow
    from pyarrow import ipc

    with pyarrow.memory_map(str(file)) as source:
        try:
            reader = ipc.open_stream(source)
            batches = iter(reader)
        except pyarrow.ArrowInvalid:
            reader = ipc.open_file(source)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        names = reader.schema.names
        # a.b.c may be field c of column a.b, or b.c of a
        tops = [name for name in names if f"{field}.".startswith(f"{name}.")]
        if not tops:
            yield "schema", dict.fromkeys(names)
            return
        place = 0
        for batch in batches:
            columns = batch.select(tops)
            for begin in range(0, len(columns), _ROWS):
                for row in columns.slice(begin, _ROWS).to_pylist():
                    place += 1
                    yield f"row {place}", row
