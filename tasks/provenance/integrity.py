"""Is a file still what the step that wrote it left? Held against dvc.lock before anything reads it.

DVC trusts its caches: a file that it has hashed once passes while size, time and inode stay, and a file in its cache
passes while it is read-only. So bytes that changed in a cache, or through a link, come back as a step's result. Here
nothing is believed but a hash: `.cache/verified.json` says for which size, times and inode a file was last hashed, by
us, and only those pass without reading the file again. Deleting it costs one reading of every file.
"""

import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nirvana.errors import InputError

LOCK = Path("dvc.lock")
LEDGER = Path(".cache/verified.json")
BY_HAND = Path(".cache/by_hand.json")
CACHE = Path(".dvc/cache/files/md5")

# A file that was written a moment ago can be written again within the same tick of the clock.
_TICK_NANOSECONDS = 50_000_000

Stamp = list[int]
"""Size, modification time, change time, device and inode: the change time, as a program can set the other back."""


@dataclass(frozen=True)
class Recorded:
    """What dvc.lock says of one output."""

    stage: str
    md5: str
    """Of a directory: as DVC digests the names and md5 of its files, with `.dir` behind it."""


@dataclass(frozen=True)
class Difference:
    """An output that is not what was recorded."""

    path: Path
    recorded: Recorded
    files: tuple[Path, ...]
    """The files that differ, are missing or are too many; the output itself where that cannot be told."""


class Ledger:
    """The md5 of files, read again only when the file was touched since."""

    def __init__(self, file: Path = LEDGER):
        self._file = file
        self._entries: dict[str, Any] = _read_object(file)
        self._changed = False

    def md5(self, path: Path, afresh: bool = False) -> str:
        """Return a file's md5.

        Args:
            path: The file; links are followed.
            afresh: Read it even if it looks untouched.
        """
        key, stamp = path.as_posix(), stamp_of(path)
        known = self._entries.get(key)
        if not afresh and isinstance(known, list) and len(known) == 2 and known[0] == stamp:
            return str(known[1])
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, _md5).hexdigest()
        if stamp_of(path) == stamp and time.time_ns() - max(stamp[1], stamp[2]) > _TICK_NANOSECONDS:
            self._entries[key] = [stamp, digest]
            self._changed = True
        return digest

    def last(self, path: Path) -> str | None:
        """Return the md5 that the file had when it was last read, whatever it has now."""
        known = self._entries.get(path.as_posix())
        return str(known[1]) if isinstance(known, list) and len(known) == 2 else None

    def tree(self, path: Path, afresh: bool = False) -> dict[str, str]:
        """Return the md5 of every file below a directory, by its path there."""
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return {file.relative_to(path).as_posix(): self.md5(file, afresh) for file in files}

    def digest(self, path: Path, afresh: bool = False) -> str | None:
        """Return what dvc.lock would say of a file or directory; None where there is none."""
        if path.is_dir():
            return tree_digest(self.tree(path, afresh))
        return self.md5(path, afresh) if path.is_file() else None

    def save(self) -> None:
        """Keep what was learnt; a full disk must not fail a step for it."""
        if self._changed:
            _write_object(self._file, self._entries)
            self._changed = False


def stamp_of(path: Path) -> Stamp:
    """Return what changes when a file is written."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_dev, found.st_ino]


def tree_digest(files: Mapping[str, str]) -> str:
    """Return DVC's digest of a directory from the md5 of its files, by path."""
    return _md5(listing(files)).hexdigest() + ".dir"


def listing(files: Mapping[str, str]) -> bytes:
    """Return what DVC's cache holds of a directory: the md5 and path of each file, as JSON."""
    listed = [{"md5": files[name], "relpath": name} for name in sorted(files)]
    return json.dumps(listed, sort_keys=True).encode()


def recorded_outputs(lock: Path = LOCK) -> dict[Path, Recorded]:
    """Return what dvc.lock says of every output of every step; nothing where there is no dvc.lock.

    Raises:
        InputError: If the file is not what DVC writes.
    """
    try:
        return _read_outputs(lock, tuple(stamp_of(lock)))
    except FileNotFoundError:
        return {}


@functools.lru_cache(maxsize=1)
def _read_outputs(lock: Path, stamp: tuple[int, ...]) -> dict[Path, Recorded]:
    import yaml

    try:
        text = lock.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise damaged_lock(lock, str(error)) from None
    try:
        stages = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["stages"]  # noqa: S506
        return {
            Path(out["path"]): Recorded(str(name), str(out["md5"]))
            for name, stage in stages.items()
            for out in stage.get("outs", [])
        }
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged_lock(lock, str(error), text) from None


def damaged_lock(lock: Path, cause: str, text: str = "") -> InputError:
    """Return the error that names a dvc.lock which cannot be read, and the remedy that fits."""
    if "\n<<<<<<< " in f"\n{text}":
        return InputError(
            f"{lock}: expected what DVC wrote, got a merge conflict; choose a side "
            f"(`git checkout --ours {lock}` or `--theirs`), then `make run` brings the results in line"
        )
    return InputError(
        f"{lock}: expected what DVC wrote, got a damaged file ({' '.join(cause.split())[:120]}); `git checkout {lock}` "
        "brings the committed one back, or `make run` makes it anew from DVC's cache"
    )


def differences(paths: Iterable[Path], ledger: Ledger, afresh: bool = False) -> list[Difference]:
    """Return those of the existing paths that are not what dvc.lock says; what it does not know is not compared."""
    recorded, found = recorded_outputs(), []
    for path in paths:
        said = recorded.get(path)
        if said is None or ledger.digest(path, afresh) in (said.md5, None):
            continue
        if ledger.digest(path, afresh=True) != said.md5:  # the ledger may be what is damaged
            found.append(Difference(path, said, _differing_files(path, said, ledger)))
    return found


def _differing_files(path: Path, said: Recorded, ledger: Ledger) -> tuple[Path, ...]:
    expected = _recorded_tree(said.md5)
    if expected is None or not path.is_dir():
        return (path,)
    actual = ledger.tree(path)
    return tuple(path / name for name in sorted(expected | actual) if expected.get(name) != actual.get(name))


def _recorded_tree(md5: str) -> dict[str, str] | None:
    """Return what DVC's cache says of a directory's files, if it does and is whole."""
    try:
        content = (CACHE / md5[:2] / md5[2:]).read_bytes()
        listed = {each["relpath"]: each["md5"] for each in json.loads(content)}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return listed if tree_digest(listed) == md5 else None


def check_inputs(paths: Iterable[Path]) -> None:
    """Refuse an input that is not what dvc.lock says its step wrote.

    Outputs that a step wrote by hand (`python -m tasks STEP`) since then are inputs of the next step by hand.

    Raises:
        InputError: Names the file, the step that wrote it and how to have it back.
    """
    ledger = Ledger()
    by_hand = {} if "DVC_STAGE" in os.environ else _read_object(BY_HAND)
    try:
        for each in differences(paths, ledger):
            if by_hand.get(each.path.as_posix()) == ledger.digest(each.path):
                continue
            raise InputError(
                f"{said_files(each.files)}: expected what {each.recorded.stage} wrote (md5 {each.recorded.md5} of "
                f"{each.path} in {LOCK}), got something else: changed or damaged since; `make run` restores it or "
                "computes it again"
            )
    finally:
        ledger.save()


def note_outputs(paths: Iterable[Path]) -> None:
    """Remember what a step wrote by hand, which dvc.lock does not know; under DVC do nothing."""
    if "DVC_STAGE" in os.environ:
        return
    ledger = Ledger()
    written = {path.as_posix(): ledger.digest(path) for path in paths}
    _write_object(BY_HAND, _read_object(BY_HAND) | written)
    ledger.save()


def said_files(files: tuple[Path, ...]) -> str:
    """Return the names of files, the first three of many."""
    shown = ", ".join(file.as_posix() for file in files[:3])
    return shown if len(files) <= 3 else f"{shown} and {len(files) - 3} more"


def _md5(content: bytes = b"") -> Any:
    return hashlib.md5(content, usedforsecurity=False)


def _read_object(file: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(file.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}


def _write_object(file: Path, content: Mapping[str, Any]) -> None:
    # no fsync: what is lost is computed again
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(file)
