"""Whether an SQLite file can be worked with, found in moments: libraries retry for minutes before they say so."""

import sqlite3
import time
from contextlib import closing
from pathlib import Path

CHECK_SECONDS = 0.5
_MAGIC = b"SQLite format 3\0"


def database_fault(path: Path, tables: tuple[str, ...] = ()) -> str | None:
    """Return what is wrong with a database, or None: it is sound as far as can be seen, or not there yet.

    Args:
        path: The file.
        tables: Those that it must have, if it has any.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_MAGIC))
        if start and start != _MAGIC:
            return "it is no SQLite database"
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=0)) as database:
            database.execute("BEGIN IMMEDIATE")  # fails where nothing can be written
            database.execute("ROLLBACK")
            present = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            missing = [table for table in tables if present and table not in present]
            if missing:
                return f"it has no table {missing[0]}: another program's"
            return _damage(database)
    except FileNotFoundError:
        return None
    except sqlite3.Error as error:
        # somebody writes: what waits for locks will wait
        return None if "locked" in str(error) or "busy" in str(error) else str(error)
    except OSError as error:
        return str(error.strerror)


def _damage(database: sqlite3.Connection) -> str | None:
    """Return what SQLite's own check finds in the time that it is given."""
    deadline = time.monotonic() + CHECK_SECONDS
    database.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
    try:
        (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError as error:
        if "interrupted" in str(error):  # a large one: nothing found so far
            return None
        raise
    return None if found == "ok" else str(found).splitlines()[-1]
