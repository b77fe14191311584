"""What lets a killed study resume: each part's value is a JSON file named by everything that it depends on.

`.cache/studies/<study>/<sha256>.json` can be deleted at any time. The digest covers what the caller states, the source
files behind the function that computes, the libraries and the kind of machine, so an edit of that code computes anew.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nirvana.errors import InputError
from nirvana.files import read_json, write_json
from tasks.code_files import code_files
from tasks.environment_digest import library_versions, machine

STUDIES = Path(".cache/studies")
_ROOT = Path(__file__).resolve().parents[2]


def cached(key_parts: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the value of one part of a study: the file's if there is one, else computed and kept.

    Args:
        key_parts: Everything that the value depends on and JSON can hold: the model's digest, the text's, ratios,
            seeds. `study` names the study and its directory.
        compute: Returns the value: finite numbers, text, lists and dictionaries with string keys. A function or a
            lambda of the study's own module, whose code becomes part of the key.

    Returns:
        The value as JSON gives it back, the first time too: tuples are lists.
    """
    key = study_key(key_parts, compute)
    file = STUDIES / str(key_parts["study"]) / f"{key}.json"
    with suppress(InputError, KeyError, TypeError):  # missing, broken or of another form: computed again
        kept: dict[str, Any] = read_json(file)["value"]
        return kept
    write_json(file, {"key": dict(key_parts), "value": compute()})
    computed: dict[str, Any] = read_json(file)["value"]
    return computed


def study_key(key_parts: Mapping[str, Any], compute: Callable[..., Any]) -> str:
    """Return the hex SHA-256 of what a value depends on: what is stated, and what computes it."""
    stated = {
        "code": source_digest(Path(compute.__code__.co_filename)),
        "libraries": library_versions(),
        "machine": machine(),
        **key_parts,
    }
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()


def digests_of_sources(root: Path) -> dict[str, str]:
    """Return the SHA-256 of every module of ours."""
    files = (file for package in ("nirvana", "tasks") for file in (root / package).rglob("*.py"))
    return {file.relative_to(root).as_posix(): _digest_of(file) for file in files}


def _digest_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


_AT_START = digests_of_sources(_ROOT)
"""Taken when this module is imported: what is edited while a study runs computes nothing in it."""


@functools.cache
def source_digest(module: Path) -> str:
    """Digest a module and what it imports of ours, as they were when this process began."""
    digest = hashlib.sha256()
    for name in code_files(module.resolve().relative_to(_ROOT), _ROOT):
        digest.update(f"{name}\0{_AT_START.get(name) or _digest_of(_ROOT / name)}".encode())
    return digest.hexdigest()
