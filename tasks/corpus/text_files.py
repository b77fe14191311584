"""Local files of text: which ones a path stands for, in which format and compression, and their documents.

They are read here row by row, not through `datasets`: decision 24 says why.
"""

import bz2
import functools
import glob
import gzip
import io
import itertools
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

from nirvana.errors import InputError
from tasks.corpus.documents import Document, describe
from tasks.corpus.pieces import Cutting, cut_documents, pieces_of_file
from tasks.corpus.text_rows import Row, csv_rows, json_rows, texts

_TEXT, _JSON, _PARQUET, _ARROW = "text", "json", "parquet", "arrow"
_FORMATS = {
    ".txt": _TEXT,
    ".text": _TEXT,
    ".md": _TEXT,
    ".markdown": _TEXT,
    ".rst": _TEXT,
    ".raw": _TEXT,  # WikiText: wiki.test.raw, wiki.test.tokens
    ".tokens": _TEXT,
    ".json": _JSON,
    ".jsonl": _JSON,
    ".ndjson": _JSON,
    ".jsonlines": _JSON,
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": _PARQUET,
    ".arrow": _ARROW,
}
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_KNOWN = f"{', '.join(_FORMATS)}; all but the last two also with {', '.join(_COMPRESSIONS)}"
# what stands beside the data in a repository, and in what datasets' save_to_disk writes
_PROSE = ("readme", "license", "licence", "notice")
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_MAGIC = {
    b"\x1f\x8b": "a gzip file; name it so (.gz)",
    b"BZh": "a bzip2 file; name it so (.bz2)",
    b"\xfd7zXZ": "an xz file; name it so (.xz)",
    b"\x28\xb5\x2f\xfd": "a zstandard file; name it so (.zst)",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"PAR1": "a parquet file; name it so (.parquet)",
    b"\xff\xfe": "UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`",
}
_LOOKED_AT = 10_000  # files below a directory
_OTHERWISE = "bytes of another encoding or no text; convert it, for example with `iconv -f LATIN1 -t UTF-8`"


class _Kind(NamedTuple):
    """What a file's suffixes say, and its name without them."""

    format: str
    suffix: str
    compression: str
    stem: str


def _kind(file: Path) -> _Kind | None:
    named = Path(file.name)
    compression = named.suffix.lower() if named.suffix.lower() in _COMPRESSIONS else ""
    if compression:
        named = named.with_suffix("")
    found = _FORMATS.get(named.suffix.lower())
    if found is None or (compression and found in (_PARQUET, _ARROW)):
        return None
    return _Kind(found, named.suffix.lower(), compression, named.stem)


def expand(path: Path) -> list[Path]:
    """Return the corpus files that a path stands for: a file, all files of a directory, or a glob (`**` allowed).

    Raises:
        InputError: If nothing matches.
    """
    shown, path = path, path.expanduser()
    # a [ in the name of something that is there is no pattern
    literal = path.exists()
    pattern = glob.escape(str(path)) if literal else str(path)
    if path.is_dir():
        pattern += "/*"
    matches = glob.glob(pattern, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
    files = sorted(Path(name) for name in matches if Path(name).is_file())
    if path.is_dir():
        files = _without_descriptions([file for file in files if _kind(file)])
    if not files:
        raise InputError(
            f"path:{shown}: expected text files ({_KNOWN}), nothing matches; {_hint(path, shown)}check corpus.source"
        )
    return files


def _without_descriptions(files: list[Path]) -> list[Path]:
    """Leave out what describes a directory's data: by name, and prose about data that is none."""
    data = [file for file in files if file.name not in _ABOUT]
    rows = [file for file in data if _format(file) != _TEXT]
    prose = [file for file in data if _format(file) == _TEXT]
    if rows and all(file.name.lower().startswith(_PROSE) for file in prose):
        return rows
    return data


def _format(file: Path) -> str | None:
    kind = _kind(file)
    return kind and kind.format


def _suffix(file: Path) -> str:
    kind = _kind(file)
    return "".join(file.suffixes[-2:]) if kind and kind.compression else file.suffix


def _hint(path: Path, shown: Path) -> str:
    """Say where below a directory there are files, if there are any."""
    if not path.is_dir():
        return ""
    looked_at = itertools.islice(path.glob("*/**/*"), _LOOKED_AT)
    below = next((file for file in looked_at if file.is_file() and _kind(file)), None)
    return f"write path:{shown}/**/*{below.suffix} for its subdirectories, or " if below else ""


def read_files(
    files: list[Path], text_field: str, split: str = "train", cutting: Cutting | None = None
) -> Iterator[Document]:
    """Stream the documents of local files.

    A text file is one document, named by its stem; a row of JSON, CSV, parquet or Arrow is one, named `split:row`. Of a
    row only the column of text matters; one whose text is null or missing is an empty document. The rows of JSON are
    its lines, the members of a list, the values of an object, if all of them are objects, or the members of its
    columns.

    Args:
        files: Files of one format, in order.
        text_field: The column that holds the text, `a.b` for a field within a column; not used for text files.
        split: Only names the rows.
        cutting: How long documents are cut; None: none is.

    Raises:
        InputError: If the formats are mixed or unknown, a file cannot be read, or has no such column.
    """
    formats = set(map(_format, files))
    if len(formats) != 1 or None in formats:
        suffixes = sorted({"".join(file.suffixes[-2:]) or file.name for file in files})
        known = [suffix for suffix, format in zip(map(_suffix, files), map(_format, files), strict=True) if format]
        remedy = (
            f"narrow corpus.source, for example to path:{files[0].parent}/*{known[0]}"
            if known
            else "where it is plain text, rename it to end in .txt"
        )
        raise InputError(f"corpus: expected files of one format among {_KNOWN}; got {', '.join(suffixes)}; {remedy}")
    if formats == {_TEXT}:
        for name, file in zip(_names(files), files, strict=True):
            yield from _text_documents(file, name, cutting)
        return
    rows = (text for file in files for text in texts(_rows(file, text_field), text_field, str(file)))
    documents = (Document(f"{split}:{index}", text) for index, text in enumerate(rows))
    yield from cut_documents(documents, cutting) if cutting else documents


def _text_documents(file: Path, name: str, cutting: Cutting | None) -> Iterator[Document]:
    with _opened(file) as text:
        parts = pieces_of_file(text, cutting) if cutting else iter([text.read()])
        checked = (_checked(part, file) for part in parts)
        yield from (cutting or Cutting()).named(Document(name, ""), checked)


def _checked(text: str, file: Path) -> str:
    if "\0" in text:
        raise InputError(f"{file}: expected UTF-8 text, got {_looks_like(file)}")
    return text


def _rows(file: Path, text_field: str) -> Iterator[Row]:
    kind = _kind(file)
    assert kind is not None
    if kind.format in (_PARQUET, _ARROW):
        from tasks.corpus.text_tables import arrow_rows, parquet_rows

        with _explained(file):
            yield from (parquet_rows if kind.format == _PARQUET else arrow_rows)(file, text_field)
    elif kind.format == "csv":
        with _opened(file, newline="") as text:
            yield from csv_rows(text, text_field, str(file), "\t" if kind.suffix == ".tsv" else None)
    else:
        with _opened(file) as text:
            yield from json_rows(text, text_field, str(file), may_name_rows=kind.suffix == ".json")


@contextmanager
def _opened(file: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """Open a file as text, uncompressed."""
    kind = _kind(file)
    assert kind is not None
    with (
        _explained(file),
        _OPEN[kind.compression](file) as binary,
        io.TextIOWrapper(binary, encoding="utf-8-sig", newline=newline) as text,  # a byte order mark is no text
    ):
        yield text


def _open_zstandard(file: Path) -> BinaryIO:
    import pyarrow

    stream: Any = pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), "zstd")
    return stream  # type: ignore[no-any-return]


_OPEN: dict[str, Callable[[Path], Any]] = {
    "": functools.partial(open, mode="rb"),
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Turn what goes wrong in a file into one line that names it."""
    try:
        yield
    except InputError:
        raise
    except UnicodeDecodeError:
        raise InputError(f"{file}: expected UTF-8 text, got {_looks_like(file)}") from None
    except PermissionError as error:
        raise InputError(f"{file}: expected a readable file, got: {error.strerror}; check its rights") from None
    except (
        EOFError,
        OSError,
        ValueError,
        NotImplementedError,
        lzma.LZMAError,
        zlib.error,
    ) as error:  # pyarrow's are ValueErrors
        raise InputError(
            f"{file}: cannot read it as its name says ({describe(error)}); it is cut off, damaged or something else: "
            "get it anew, or rename it"
        ) from error


def _looks_like(file: Path) -> str:
    kind = _kind(file)
    if kind is None or kind.compression:
        return _OTHERWISE
    with file.open("rb") as opened:
        head = opened.read(8)
    return next((said for magic, said in _MAGIC.items() if head.startswith(magic)), _OTHERWISE)


def _names(files: list[Path]) -> list[str]:
    """Return the stems of files, or their paths where stems repeat, with suffixes where these still do."""
    stems = [kind.stem if (kind := _kind(file)) else file.stem for file in files]
    if len(set(stems)) == len(stems):
        return stems
    root = os.path.commonpath([str(file.parent) for file in files])
    paths = [(file.relative_to(root).parent / stem).as_posix() for file, stem in zip(files, stems, strict=True)]
    often = Counter(paths)
    return [
        path if often[path] == 1 else file.relative_to(root).as_posix() for path, file in zip(paths, files, strict=True)
    ]
