"""Local text: compressed, nested, of any width and length; what cannot be read is named by file and row."""

import bz2
import gzip
import io
import json
import lzma
import random
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from nirvana.errors import InputError
from tasks.corpus.documents import Document
from tasks.corpus.pieces import Cutting
from tasks.corpus.text_files import expand, read_files
from tasks.corpus.text_rows import json_rows, texts

ROWS = [{"id": number, "text": f"This is row {number}."} for number in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
DOCUMENTS = [Document(f"train:{row['id']}", str(row["text"])) for row in ROWS]
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
}


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, content):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path, field="text", **options):
    return list(read_files(expand(Path(path)), field, **options))


def refused(path, field="text"):
    with pytest.raises(InputError) as caught:
        read(path, field)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["c4-train.00000-of-01024.json", "ROWS.JSONL", "rows.ndjson"])
def test_rows_of_every_compression(name, suffix):
    write(f"data/{name}{suffix}", COMPRESS[suffix](LINES.encode()))
    assert read(f"data/{name}{suffix}") == read("data") == read("data/*") == DOCUMENTS


@pytest.mark.parametrize("suffix", COMPRESS)
def test_text_of_every_compression(suffix):
    write(f"speech.one.TXT{suffix}", COMPRESS[suffix]("\ufeffTwo\r\nlines".encode()))
    assert read(f"speech.one.TXT{suffix}") == [Document("speech.one", "Two\nlines")]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_cut_off_or_no_such_compression(suffix):
    noise = random.Random(0).randbytes(3000).hex().encode()
    write(f"cut.txt{suffix}", COMPRESS[suffix](noise)[:900])
    assert refused(f"cut.txt{suffix}").startswith(f"cut.txt{suffix}: cannot read it as its name says")
    write(f"plain.txt{suffix}", "plain")
    assert "plain.txt" in refused(f"plain.txt{suffix}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("Größe".encode("latin-1"), "another encoding"),
        ("Größe".encode("utf-16"), "UTF-16"),
        (b"a\0b", "expected UTF-8 text"),
        (gzip.compress(b"a", mtime=0), r"a gzip file; name it so (.gz)"),
        (b"\xff" * 9, "another encoding"),
    ],
)
def test_bytes_that_are_no_text(content, said):
    for name in ("a.txt", "a.csv", "a.jsonl"):
        write(name, content)
        message = refused(name)
        assert message.startswith(name)
        assert said in message or name != "a.txt"


def test_only_the_text_matters_in_a_row():
    lines = [{"id": n if n < 900 else f"x{n}", "text": f"row {n}"} for n in range(1000)]
    write("a.jsonl", "".join(json.dumps(row) + "\n" for row in lines))
    assert len(read("a.jsonl")) == 1000
    write("two/a.jsonl", '{"text": "one", "x": 1}\n')
    write("two/b.jsonl", '{"y": {"x": []}, "text": "two"}\n\n{"text": null}\n{"y": 1}\n')
    assert [document.text for document in read("two")] == ["one", "two", "", ""]
    lines[17]["text"] = 5
    write("a.jsonl", "".join(json.dumps(row) + "\n" for row in lines))
    assert "'text' holds int in a.jsonl, line 18; choose another column" in refused("a.jsonl")
    write("two/c.jsonl", '{"body": "one", "meta": {"text": "x"}}\n')
    assert refused("two").endswith("expected a column of two/c.jsonl, got 'text'; it has: body, meta.text")


def test_tables_may_differ_in_other_columns(tmp_path):
    (tmp_path / "t").mkdir()
    parquet.write_table(pyarrow.table({"text": ["one", None], "x": [1, 2]}), "t/a.parquet")
    parquet.write_table(pyarrow.table({"x": ["?"], "text": ["two"]}), "t/b.PARQUET")
    assert [document.text for document in read("t")] == ["one", "", "two"]


def test_a_field_within_a_column():
    rows = [{"data": {"text": f"row {n}", "n": n}, "data.text2": "literal", "data.b": {"c": "deep"}} for n in range(3)]
    write("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), "a.parquet")
    with pyarrow.OSFile("a.arrow", "wb") as sink:
        table = pyarrow.Table.from_pylist(rows)
        with ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    for name in ("a.jsonl", "a.parquet", "a.arrow"):
        assert [document.text for document in read(name, "data.text")] == ["row 0", "row 1", "row 2"]
        assert read(name, "data.text2")[0].text == "literal"
        assert read(name, "data.b.c")[0].text == "deep"
        assert "'data.n' holds int" in refused(name, "data.n")
        assert "got 'text'; it has:" in refused(name, "text")


def test_a_conversation_is_no_text():
    write("a.jsonl", '{"messages": [{"role": "user", "content": "Hello"}]}\n')
    assert "'messages' holds list of {role, content}: a conversation" in refused("a.jsonl", "messages")


def test_csv_is_text_as_it_stands():
    write("a.csv", 'id,text\n1,NA\n2,null\n3,\n4,"a ""b"", c"\n5,"two\nlines"\n')
    assert [document.text for document in read("a.csv")] == ["NA", "null", "", 'a "b", c', "two\nlines"]
    write("b.csv", "id;text\n1;one, two\n")
    write("c.tsv", "id\ttext\n1\tone, two\n")
    assert read("b.csv")[0].text == read("c.tsv")[0].text == "one, two"
    write("d.csv", "text\none, two\n")
    assert refused("d.csv").startswith("d.csv:2: expected 1 values, as the header has, got 2; put text")
    write("e.csv", 'text\n"one\n')
    assert refused("e.csv").startswith("e.csv:2: cannot read it as CSV")
    write("f.csv", "text\n" + '"' + "word " * 100_000 + '"\n')
    assert len(read("f.csv")[0].text) == 500_000


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (json.dumps([{"text": "a"}, {"text": "b"}], indent=1), ["a", "b"]),
        (json.dumps({"text": ["a", "b"], "id": [1, 2]}), ["a", "b"]),
        ('{\n"text": "a"\n}\n{\n"text": "b"\n}', ["a", "b"]),
        ('[{"text": "half \\ud83d, whole \\ud83d\\ude00"}]', ["half \ufffd, whole \U0001f600"]),
        ("[]", []),
        ("", []),
    ],
)
def test_forms_of_json(content, expected):
    write("a.json", content)
    assert [document.text for document in read("a.json")] == expected


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ('{"text": "a"}\n{bad\n', "a.json:2"),
        ('{"text": "a"}\n{"text": "b', "a.json:2"),
        ('[{"text": "a"}, {"text": b}]', "a.json, row 2"),
        ('[{"text": "a"}, {"text": "b"}', "a.json, row 3"),
        ("[" * 50_000, "a.json, row 1"),
        ('{"a":' * 50_000, "a.json"),
        ('{"text": "a"}\n' + '{"a":' * 50_000, "a.json:2"),
        ('"text"\n"more"\n', "a.json, line 1"),
    ],
)
def test_broken_json_is_named_by_row(content, place):
    write("a.json", content)
    assert refused("a.json").startswith(f"{place}: ") or refused("a.json").startswith(f"{place}:")


def test_what_describes_the_data_is_no_data():
    write("a/README.md", "About")
    write("a/dataset_info.json", "{}")
    write("a/rows.jsonl.gz", gzip.compress(LINES.encode()))
    assert read("a") == DOCUMENTS
    write("b/README.md", "About")
    write("b/notes.md", "Notes")
    assert [document.id for document in read("b")] == ["README", "notes"]


def test_a_directory_of_directories_says_how_to_write_it():
    write("a/b/c/rows.jsonl.gz", gzip.compress(LINES.encode()))
    assert "write path:a/**/*.gz" in refused("a")
    assert read("a/**/*.gz") == DOCUMENTS


def test_names_are_never_two_documents():
    for name in ("d/a.txt", "d/a.md", "d/b.txt"):
        write(name, name)
    assert [document.id for document in read("d")] == ["a.md", "a.txt", "b"]


def test_home_and_brackets(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("text [1].txt", "one")
    assert read("~/text [1].txt") == [Document("text [1]", "one")]


def test_a_long_file_is_read_in_bounded_memory():
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgh", k=6)) for _ in range(5000)]
    with Path("book.txt").open("w") as file:
        for _ in range(2000):
            file.write(" ".join(generator.choices(words, k=500)) + ".\n\n")
    assert Path("book.txt").stat().st_size > 6_000_000
    tracemalloc.start()
    stream = read_files([Path("book.txt")], "text", cutting=Cutting())
    count = sum(1 for _ in stream)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 7_000_000 / 8192 < count < 7_100_000 / 4096
    assert peak < 4_000_000
    # one line of it is cut into the same pieces
    write("line.jsonl", json.dumps({"text": Path("book.txt").read_text()}) + "\n")
    (pieces, lines) = ([each.text for each in read(name, cutting=Cutting())] for name in ("book.txt", "line.jsonl"))
    assert pieces == lines


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.csv", "a.jsonl.gz", "a.txt.zst", "a.parquet", "a.arrow"])
def test_any_bytes_are_read_or_refused_in_one_line(name, content):
    write(name, content)
    try:
        assert all(isinstance(document.text, str) for document in read(name))
    except InputError as error:
        assert "\n" not in str(error)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a", "a.b"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.sampled_from(["text", "a"]), VALUES, max_size=2), max_size=4),
    indent=st.none() | st.just(1),
)
def test_any_rows_give_their_text_or_a_reason(rows, indent):
    """Lines, a list in one line and a list over many lines mean the same."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    found = []
    for content in (lines, json.dumps(rows), json.dumps(rows, indent=1)):
        try:
            found.append(list(texts(json_rows(io.StringIO(content), "text", "f", False), "text", "f")))
        except InputError as error:
            found.append("column" in str(error))
    if len(rows) != 1:  # one object alone may also be columns
        assert found[0] == found[1] == found[2]
    expected = [row.get("text") for row in rows]
    if all(each is None or isinstance(each, str) for each in expected) and any("text" in row for row in rows):
        assert found[1] == [each or "" for each in expected]


def texts_of(file: Path, field: str = "text") -> list[str]:
    return [document.text for document in read_files([file], field)]


@pytest.mark.parametrize("value", ["1984", "NaN", "-Infinity"])
def test_csv_rows_that_look_like_numbers_make_no_column_of_numbers(tmp_path: Path, value: str) -> None:
    rows = [value] * 150 + ["The river divides the nation."]
    (tmp_path / "a.csv").write_text("id,text\n" + "".join(f"{number},{row}\n" for number, row in enumerate(rows)))
    assert texts_of(tmp_path / "a.csv") == rows


def test_a_csv_column_of_numbers_with_gaps_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,id\nx,NaN\ny,1.5\nz,\nw,3\n")
    with pytest.raises(InputError, match="'id' holds float"):
        texts_of(tmp_path / "a.csv", "id")


def test_numbers_of_any_length_in_other_columns_do_not_matter(tmp_path: Path) -> None:
    digits = "9" * 5000
    (tmp_path / "a.jsonl").write_text(f'{{"text": "one", "n": {digits}}}\n{{"text": "two", "n": -{digits}}}\n')
    assert texts_of(tmp_path / "a.jsonl") == ["one", "two"]
    (tmp_path / "b.json").write_text(f'[{{"text": "one", "n": {digits}}}]')
    assert texts_of(tmp_path / "b.json") == ["one"]
    with pytest.raises(InputError, match="'n' holds float"):
        texts_of(tmp_path / "a.jsonl", "n")


def test_a_table_that_pandas_wrote_by_columns_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"id": {"0": 5, "1": 6}, "text": {"0": "one", "1": null}}')
    assert texts_of(tmp_path / "a.json") == ["one", ""]
    # rows by name, one of which is called as the column is
    (tmp_path / "b.json").write_text('{"text": {"text": "one"}, "other": {"text": "two"}}')
    assert texts_of(tmp_path / "b.json") == ["one", "two"]


def test_a_file_without_header_is_told_in_a_short_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("".join(f"{number},{'word ' * 3000}\n" for number in range(3)))
    with pytest.raises(InputError, match="it has: 0, word") as caught:
        texts_of(tmp_path / "a.csv")
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("name", ["wiki.test.raw", "wiki.train.tokens", "notes.markdown", "page.rst"])
def test_plain_text_by_other_names_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("The river divides the nation.")
    assert texts_of(tmp_path / name) == ["The river divides the nation."]


def test_the_way_out_of_an_unknown_or_mixed_format_is_named(tmp_path: Path) -> None:
    for name in ("book", "a.txt", "b.jsonl"):
        (tmp_path / name).write_text("text")
    with pytest.raises(InputError, match=r"got book; where it is plain text, rename it to end in \.txt"):
        texts_of(tmp_path / "book")
    with pytest.raises(InputError, match=r"for example to path:.*/\*\.txt"):
        list(read_files([tmp_path / "a.txt", tmp_path / "b.jsonl"], "text"))
