"""Damage is found in moments, and what is sound, busy or not there is no damage."""

import sqlite3
import time
from pathlib import Path

import pytest

from tasks.tracking.sqlite_file import database_fault


@pytest.fixture
def database(tmp_path: Path) -> Path:
    file = tmp_path / "a b#?.db"
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE runs (a TEXT)")
        connection.executemany("INSERT INTO runs VALUES (?)", [(f"{number}" * 50,) for number in range(5000)])
    connection.close()
    return file


def test_what_is_sound_or_absent_is_no_fault(database: Path, tmp_path: Path) -> None:
    assert database_fault(database, tables=("runs",)) is None
    assert database_fault(tmp_path / "none.db") is None
    (tmp_path / "empty.db").touch()
    assert database_fault(tmp_path / "empty.db", tables=("runs",)) is None
    other = sqlite3.connect(database)
    other.execute("BEGIN EXCLUSIVE")
    assert database_fault(database) is None
    other.close()


def test_half_a_file_other_bytes_and_other_tables_are_faults(database: Path, tmp_path: Path) -> None:
    content = database.read_bytes()
    start = time.monotonic()
    for damaged in (
        content[: len(content) // 2],
        content[:50],
        b"\0" * 5000,
        b"text\n" * 100,
        content[:100] + b"\xff" * 9000,
    ):
        database.write_bytes(damaged)
        fault = database_fault(database, tables=("runs",))
        assert fault and "\n" not in fault, damaged[:20]
    assert "no table experiments" in (database_fault(_with(tmp_path, content), tables=("experiments",)) or "")
    assert database_fault(tmp_path) == "Is a directory"
    assert time.monotonic() - start < 5


def _with(folder: Path, content: bytes) -> Path:
    (folder / "other.db").write_bytes(content)
    return folder / "other.db"
