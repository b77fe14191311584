"""Files that appear whole or not at all, and their digests.

Everything NIRVANA writes goes to a temporary sibling first and is renamed when complete, so that a killed
run never leaves half an artifact under its final name. What a killed process left is removed by the next writer.
"""

import glob
import hashlib
import json
import math
import os
import shutil
import socket
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nirvana.errors import InputError

_UMASK = os.umask(0)
os.umask(_UMASK)
_MODE = 0o666 & ~_UMASK  # libraries that write through temporary files of their own leave 0600

_JSON_LIMIT = 64 << 20  # bytes; the plan of a 70B model has 7 MB: what is larger is weights given by mistake


def _temporary_sibling(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname()
    for left in path.parent.glob(f".{glob.escape(path.name)}.{host}-*.tmp"):
        if not _is_alive(left.name.removesuffix(".tmp").split("-")[-2]):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")


def _is_alive(process: str) -> bool:
    """Tell whether a process of this machine may still be writing what a killed one would have left."""
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):  # not ours to judge
        return True
    return True


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path; on success it becomes `path`, on any error it is removed."""
    path = Path(path)
    temporary = _temporary_sibling(path)
    try:
        yield temporary
        temporary.chmod(_MODE)
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path | str) -> Iterator[Path]:
    """Yield a new empty directory; on success it replaces `path`, on any error it is removed."""
    path = Path(path)
    temporary = _temporary_sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                file.chmod(_MODE)
            _fsync(file)
        _fsync(temporary)
        if path.exists():
            # rename cannot replace a directory that has content: move the old one away first
            outgoing = _temporary_sibling(path)
            path.replace(outgoing)
            try:
                temporary.replace(path)
            except BaseException:
                outgoing.replace(path)
                raise
            shutil.rmtree(outgoing)
        else:
            temporary.replace(path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def scratch_directory(path: Path | str) -> Iterator[Path]:
    """Yield a new empty directory beside `path`, on the same disk; it is gone afterwards, whatever happens."""
    temporary = _temporary_sibling(Path(path))
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_sealed(path: Path | str, value: bytes) -> None:
    """Write bytes with their SHA-256 before them, so that `read_sealed` can tell whether they are whole."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(_seal(value) + value)


def read_sealed(path: Path | str) -> bytes | None:
    """Return what `write_sealed` wrote; None where there is no such file, or a bit of it changed."""
    try:
        content = Path(path).read_bytes()
    except OSError:
        return None
    value = content[_SEAL_BYTES:]
    return value if content[:_SEAL_BYTES] == _seal(value) else None


def _seal(value: bytes) -> bytes:
    return f"sha256:{hashlib.sha256(value).hexdigest()}\n".encode()


_SEAL_BYTES = len(_seal(b""))


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys; NaN and infinity are refused."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path | str, unique_keys: bool = False) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        unique_keys: Refuse an object that has a key twice, of which readers take the one or the other.

    Raises:
        InputError: If the file is missing, larger than 64 MiB or not JSON, which knows neither NaN nor infinity.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(_JSON_LIMIT + 1)
        if len(content) > _JSON_LIMIT:
            raise ValueError(f"more than {_JSON_LIMIT >> 20} MiB")
        hook = _unique if unique_keys else None
        return json.loads(content.decode("utf-8"), parse_constant=_finite, parse_float=_finite, object_pairs_hook=hook)
    except FileNotFoundError:
        raise InputError(f"{path}: expected a JSON file, found nothing; run the step that writes it") from None
    except OSError as error:
        raise InputError(f"{path}: expected a readable JSON file, got {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, a number of over 4300 digits
        raise InputError(
            f"{path}: expected JSON, got something else ({error}); give another file, or run its step again"
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        (key, _), *_ = ((key, times) for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {key!r} stands twice in one object")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def sha256_file(path: Path | str) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_directory(path: Path | str) -> str:
    """Return one hex SHA-256 for the names and bytes of all files under a directory."""
    root = Path(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in root.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(root).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def followed(path: Path | str, root: Path | str) -> Path:
    """Return the regular file that a path inside a directory stands for, links resolved.

    A link may lead to another file of the directory, or from a snapshot of a Hugging Face cache to its blobs
    (`models--ORG--NAME/snapshots/REVISION/file` -> `../../blobs/HASH`). Any other would let a directory that was made
    elsewhere put a file of this machine into what is copied from it.

    Args:
        path: The file.
        root: The directory that it belongs to; may itself be reached through links.

    Raises:
        InputError: If it is missing, no regular file, or a link that leads elsewhere.
    """
    path = Path(path)
    try:
        file, directory = path.resolve(strict=True), Path(root).resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise InputError(
            f"{path}: expected a file, got a link that leads nowhere or nothing at all; put the file in its place"
        ) from error
    if not file.is_file():
        raise InputError(f"{path}: expected a regular file, got something else; keep it out of the directory")
    if not file.is_relative_to(directory) and file.parent != _blobs_of(directory):
        raise InputError(
            f"{path}: expected a file of this directory, got a link to a file outside it; "
            "put the file itself there if it belongs to the model"
        )
    return file


def _blobs_of(snapshot: Path) -> Path | None:
    """Return where a Hugging Face cache keeps the files of one of its snapshots; None for any other directory."""
    repository = snapshot.parent.parent
    is_snapshot = snapshot.parent.name == "snapshots" and "--" in repository.name
    return repository / "blobs" if is_snapshot else None


def copy_regular(source: Path | str, target: Path | str, root: Path | str) -> None:
    """Copy one file of a directory's, mode 0644; links are followed as `followed` says.

    Args:
        source: The file.
        target: Where its copy appears.
        root: The directory that the file belongs to.

    Raises:
        InputError: As `followed`.
    """
    shutil.copyfile(followed(source, root), target)
    Path(target).chmod(0o644)
