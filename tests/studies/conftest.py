"""What the tests of studies that train their own models share."""

import random

import pytest
from tiny import tiny_sentence

from nirvana.files import sha256_file, write_json
from tasks.corpus.documents import Document, write_documents


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A corpus of made-up speeches; the study's cache goes beside it."""
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "corpus"
    directory.mkdir()
    speeches = []
    for number in range(60):
        generator = random.Random(number)
        speeches.append(Document(f"{number}", " ".join(tiny_sentence(generator) for _ in range(20))))
    write_documents(directory / "documents.jsonl", speeches)
    write_json(directory / "source.json", {"digest": f"sha256:{sha256_file(directory / 'documents.jsonl')}"})
    return directory
