"""Files of DVC's own that cannot be read: set aside or dropped, for DVC makes all of them again.

dvc.lock comes back from the run-cache, the run-cache from running, the note of who works on what (rwlock) and the
database of hashes from nothing. None of them may stop a run.
"""

import functools
import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from nirvana.errors import InputError
from tasks.provenance.integrity import LOCK, Ledger, damaged_lock, recorded_outputs, stamp_of

RWLOCK = Path(".dvc/tmp/rwlock")
SET_ASIDE = Path(".cache/damaged")

Say = Callable[[str], object]

_BEING_WRITTEN_SECONDS = 60


def cache_directory() -> Path:
    """Return DVC's cache, which several checkouts may share."""
    return _cache_directory(Path.cwd())


@functools.cache
def _cache_directory(checkout: Path) -> Path:
    from dvc.config import Config

    with suppress(Exception):  # whatever is wrong with the configuration, DVC says it
        return Path(Config(str(checkout / ".dvc"))["cache"].get("dir") or ".dvc/cache")
    return Path(".dvc/cache")


def mend_own_files(say: Say) -> bool:
    """Set aside files of DVC's that it cannot read, all of which it makes again; tell whether any was.

    Raises:
        InputError: If dvc.lock holds a merge conflict, which only its owner can settle.
    """
    mended = drop_damaged_runs(say)
    if RWLOCK.exists() and not _is_rwlock(RWLOCK):
        mended |= _set_aside(RWLOCK, "the note of who works on what", say)
    try:
        _check_lock()
    except InputError as error:
        if "merge conflict" in str(error):
            raise
        mended |= _set_aside(LOCK, "what the results belong to; it is made again from DVC's run-cache", say)
    return mended


def _check_lock() -> None:
    if LOCK.exists():
        recorded_outputs()
        _check_schema(tuple(stamp_of(LOCK)))


@functools.lru_cache(maxsize=1)
def _check_schema(stamp: tuple[int, ...]) -> None:
    import yaml
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA

    content = yaml.load(LOCK.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
    try:
        COMPILED_LOCKFILE_SCHEMA(content)
    except Exception as error:  # voluptuous has several
        raise damaged_lock(LOCK, str(error)) from None


def _is_rwlock(file: Path) -> bool:
    from dvc.rwlock import SCHEMA

    try:
        SCHEMA(json.loads(file.read_text(encoding="utf-8")))
    except Exception:  # not JSON, not UTF-8, or of another form
        return False
    return True


def _set_aside(file: Path, what: str, say: Say) -> bool:
    SET_ASIDE.mkdir(parents=True, exist_ok=True)
    target = SET_ASIDE / file.name
    remove(target)
    file.replace(target)
    say(f"{file}: damaged ({what}); moved to {target}")
    return True


def drop_damaged_runs(say: Say, afresh: bool = False) -> bool:
    """Remove entries of DVC's run-cache whose content is not their name; tell whether any was."""
    from dvc.utils import dict_sha256

    ledger, dropped = Ledger(), False
    runs = cache_directory() / "runs"
    for file in sorted(runs.glob("*/*/*")):
        if file.name.startswith(".") and time.time() - file.stat().st_mtime < _BEING_WRITTEN_SECONDS:
            continue  # another checkout's DVC writes it just now
        known = ledger.last(file)
        if not afresh and known and ledger.md5(file) == known:
            continue
        if _content_digest(file, dict_sha256) == file.name:
            ledger.md5(file)  # remembered from now on
        else:
            file.unlink(missing_ok=True)
            say(f"{file}: damaged; dropped from DVC's run-cache, its step is computed again when it is asked for")
            dropped = True
    for folder in runs.glob("*/*"):
        with suppress(OSError):  # DVC fails on an empty one, which a killed run leaves too
            folder.rmdir()
            dropped = True
    ledger.save()
    return dropped


def _content_digest(file: Path, digest: Callable[..., str]) -> str | None:
    import yaml

    with suppress(Exception):  # whatever a flipped bit makes of YAML
        content = yaml.load(file.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
        return digest(content, exclude=["size", "nfiles"])
    return None


def is_about_state(error: BaseException) -> bool:
    """Tell whether it was DVC's database of hashes that failed."""
    import sqlite3

    found: BaseException | None = error
    while found is not None:
        if isinstance(found, sqlite3.Error) or type(found).__module__.startswith("diskcache"):
            return True
        found = found.__cause__ or found.__context__
    return False


def drop_state(say: Say) -> bool:
    """Remove DVC's database of hashes, which it makes again by reading the files."""
    with suppress(Exception):
        place = _state_directory()
        for name in ("hashes", "links", "index"):
            remove(place / name)
        say(f"{place}: DVC's database of hashes is damaged; removed, every file is hashed again")
        return True
    return False


def _state_directory() -> Path:
    """Return where DVC keeps its database of hashes; asked of DVC without opening it."""
    from dvc.config import Config
    from dvc.repo import Repo
    from dvc_objects.fs import LocalFileSystem

    unopened, root = object.__new__(Repo), Path.cwd()
    unopened.__dict__ |= {
        "root_dir": root.as_posix(),
        "config": Config((root / ".dvc").as_posix()),
        "tmp_dir": (root / ".dvc/tmp").as_posix(),
        "_fs": LocalFileSystem(),
    }
    return Path(unopened.site_cache_dir)


def remove(path: Path) -> None:
    """Remove a file, a link or a directory, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
