"""Documents: a corpus as a stream of (id, text), and the documents.jsonl that holds them."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from nirvana.errors import InputError
from nirvana.files import atomic_file

Item = TypeVar("Item")

DATASETS_CACHE = Path(".cache/datasets")


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
    documents = []
    try:
        # only \n ends a line: texts may hold characters that others take for line ends
        with path.open(encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip("\n"):
                    documents.append(_document(line, f"{path}:{number}"))
    except (FileNotFoundError, UnicodeDecodeError):
        raise InputError(f"{path}: expected documents, one JSON object a line; run the step that writes it") from None
    return documents


def _document(line: str, where: str) -> Document:
    try:
        row = json.loads(line)
        document = Document(row["id"], row["text"], int(row.get("source", 0)))
        if not isinstance(document.id, str) or not isinstance(document.text, str):
            raise TypeError
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise InputError(
            f'{where}: expected {{"id", "text"}} as JSON, got {line[:60].strip()!r}; run fetch_corpus and sample_pool '
            "again to have it written anew"
        ) from None
    return document


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


def describe(error: BaseException) -> str:
    """Return an error and its cause as one short line."""
    causes = [error, *([error.__cause__] if error.__cause__ else [])]
    text = "; ".join(" ".join(f"{type(cause).__name__}: {cause}".split()) for cause in causes)
    return text if len(text) <= 300 else text[:297] + "..."
