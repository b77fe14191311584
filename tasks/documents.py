"""Documents: a corpus as a stream of (id, text), and the documents.jsonl that holds them."""

import glob
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from nirvana.errors import InputError
from nirvana.files import atomic_file

Item = TypeVar("Item")

_LOG = logging.getLogger(__name__)

DATASETS_CACHE = Path(".cache/datasets")
_SHOWN_COLUMNS = 10
_LOADERS = {
    ".txt": "text",
    ".md": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}


class Document(NamedTuple):
    """One text and the name that says where it came from."""

    id: str
    text: str
    source: int = 0
    """Which of the corpus's sources, counted from 0."""


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """Write documents.jsonl: one {"id", "text"} a line, in order, and "source" from the second one on."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for document in documents:
            row = document._asdict()
            if not document.source:
                del row["source"]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_documents(path: Path) -> list[Document]:
    """Read documents.jsonl.

    Raises:
        InputError: If the file is missing or a line is not a document.
    """
    try:
        # not splitlines(): texts may hold characters that it takes for line ends
        lines = path.read_text(encoding="utf-8").split("\n")
    except (FileNotFoundError, UnicodeDecodeError):
        raise InputError(f"{path}: expected documents, one JSON object a line; run the step that writes it") from None
    documents = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            documents.append(Document(row["id"], row["text"], int(row.get("source", 0))))
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f'{path}:{number}: expected {{"id", "text"}} as JSON, got {line[:60]!r}; delete the file and run again'
            ) from None
    return documents


def in_turn(documents: Iterable[Document], per_source: Callable[[list[Document]], Iterable[Item]]) -> Iterator[Item]:
    """Take what is made of each source's documents in turn: as many items of one as of another, while they last.

    Args:
        documents: Of all sources; a source's keep their order.
        per_source: Makes items of one source's documents.
    """
    of_source: dict[int, list[Document]] = {}
    for document in documents:
        of_source.setdefault(document.source, []).append(document)
    queues = [iter(per_source(of_source[source])) for source in sorted(of_source)]
    while queues:
        for queue in list(queues):
            try:
                yield next(queue)
            except StopIteration:
                queues.remove(queue)


def expand(path: Path) -> list[Path]:
    """Return the corpus files that a path stands for: a file, all files of a directory, or a glob (`**` allowed).

    Raises:
        InputError: If nothing matches.
    """
    pattern = f"{glob.escape(str(path))}/*" if path.is_dir() else str(path)
    matches = glob.glob(pattern, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
    files = sorted(Path(name) for name in matches if Path(name).is_file())
    if path.is_dir():
        files = [file for file in files if file.suffix in _LOADERS]
    if not files:
        raise InputError(
            f"path:{path}: expected text files ({', '.join(_LOADERS)}), nothing matches; check corpus.source"
        )
    return files


def read_files(files: list[Path], text_field: str, split: str = "train") -> Iterator[Document]:
    """Stream the documents of local files through `datasets`.

    A text file is one document, named by its stem; a row of JSON, CSV or parquet is one, named `split:row`. The rows of
    JSON are its lines, the members of a list, or the values of an object, if all of them are objects.

    Args:
        files: Files of one format, in order.
        text_field: The column that holds the text; not used for text files.
        split: Only names the rows.

    Raises:
        InputError: If the formats are mixed or unknown, a file cannot be read, or there is no such column.
    """
    loaders = {_LOADERS.get(file.suffix) for file in files}
    if len(loaders) != 1 or None in loaders:
        suffixes = sorted({file.suffix or file.name for file in files})
        raise InputError(
            f"corpus: expected files of one format among {', '.join(_LOADERS)}, got {', '.join(suffixes)}; "
            "narrow corpus.source"
        )
    loader = loaders.pop()
    options: dict[str, Any] = {"sample_by": "document"} if loader == "text" else {}
    # a [ in a real name is no pattern
    names = [glob.escape(os.path.abspath(file)) for file in files]  # noqa: PTH100 - resolve() would follow links
    try:
        named = [rows for file in files if (rows := _named_rows(file)) is not None]
        if named and len(named) < len(files):
            raise InputError(
                f"corpus: expected JSON files of one form, {len(named)} of {len(files)} are an object of rows each; "
                "narrow corpus.source"
            )
        if named:
            yield from read_rows((row for rows in named for row in rows), text_field, split)
            return
        from datasets import load_dataset

        rows = load_dataset(
            loader, data_files={"train": names}, split="train", streaming=True, cache_dir=str(DATASETS_CACHE), **options
        )
        if loader == "text":
            for name, row in zip(_names(files), rows, strict=True):
                yield Document(name, row["text"])
        else:
            yield from read_rows(rows, text_field, split)
    except InputError:
        raise
    except Exception as error:  # datasets wraps the readers' errors in many types of its own
        raise InputError(
            f"corpus: cannot read {files[0]}{' and others' if len(files) > 1 else ''} as {loader} "
            f"({describe(error)}); check that the files are UTF-8 and whole"
        ) from error


def _named_rows(file: Path) -> list[dict[str, Any]] | None:
    """Return the values of a `.json` file that is an object of objects: rows, which `datasets` would take for columns.

    What a row lacks of the others' columns is null, as in the other forms. None for any other file; of one that holds a
    row a line only the first two lines are read.
    """
    if file.suffix != ".json":
        return None
    with file.open(encoding="utf-8-sig") as opened:
        first = opened.readline()
        if not first.lstrip().startswith("{"):
            return None
        with suppress(json.JSONDecodeError):
            json.loads(first)
            if opened.readline().strip():
                return None
        try:
            whole = json.loads(first + opened.read())
        except json.JSONDecodeError:
            return None
    if not whole or not all(isinstance(row, dict) for row in whole.values()):
        return None
    columns = dict.fromkeys(column for row in whole.values() for column in row)
    return [{column: row.get(column) for column in columns} for row in whole.values()]


def read_rows(rows: Iterable[dict[str, Any]], text_field: str, split: str) -> Iterator[Document]:
    """Name the rows of a dataset and take their text.

    Raises:
        InputError: If the dataset has no such column, or the column holds something else than text.
    """
    for index, row in enumerate(rows):
        if text_field not in row:
            columns = ", ".join(sorted(row)[:_SHOWN_COLUMNS]) + (", ..." if len(row) > _SHOWN_COLUMNS else "")
            raise InputError(
                f"corpus.text_field: expected a column of the corpus, got {text_field!r}; it has: {columns}"
            )
        text = row[text_field]
        if not isinstance(text, str | None):
            raise InputError(
                f"corpus.text_field: expected a column of text, {text_field!r} holds {type(text).__name__}; "
                "choose another column"
            )
        yield Document(f"{split}:{index}", text or "")


def _names(files: list[Path]) -> list[str]:
    """Return the stems of files, or their paths where stems repeat."""
    stems = [file.stem for file in files]
    if len(set(stems)) == len(stems):
        return stems
    parents = [str(file.parent) for file in files]
    root = os.path.commonpath(parents)
    return [file.relative_to(root).with_suffix("").as_posix() for file in files]


def describe(error: BaseException) -> str:
    """Return an error and its cause as one short line."""
    causes = [error, *([error.__cause__] if error.__cause__ else [])]
    text = "; ".join(" ".join(f"{type(cause).__name__}: {cause}".split()) for cause in causes)
    return text if len(text) <= 300 else text[:297] + "..."
