"""What lets a killed study resume: each part's value is a JSON file named by everything that it depends on.

`.cache/studies/<study>/<sha256>.json` can be deleted at any time. A digest beside the value tells one that was damaged
since. The digest in the name covers what the caller states, the source
files behind the function that computes, the libraries and the kind of machine, so an edit of that code computes anew;
one of its comments or docstrings does not.
"""

import ast
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nirvana.errors import InputError
from nirvana.files import read_json, write_json
from tasks.provenance.code_files import code_files
from tasks.provenance.environment_digest import library_versions, machine

STUDIES = Path(".cache/studies")
_ROOT = Path(__file__).resolve().parents[1]


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
        content = read_json(file)
        kept: dict[str, Any] = content["value"]
        if content["digest"] == _value_digest(kept):
            return kept
    value = json.loads(json.dumps(compute()))
    write_json(file, {"key": dict(key_parts), "value": value, "digest": _value_digest(value)})
    computed: dict[str, Any] = read_json(file)["value"]
    return computed


def _value_digest(value: Any) -> str:
    """Return the hex SHA-256 of a value as JSON spells it: a bit that changed on the disk is told."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def study_key(key_parts: Mapping[str, Any], compute: Callable[..., Any]) -> str:
    """Return the hex SHA-256 of what a value depends on: what is stated, and what computes it."""
    stated = {
        "code": source_digest(Path(compute.__code__.co_filename)),
        "libraries": library_versions(),
        "machine": machine(),
        **key_parts,
    }
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()


def sources(root: Path) -> dict[str, bytes]:
    """Return every module of ours as it is now."""
    files = (file for package in ("nirvana", "tasks", "studies") for file in (root / package).rglob("*.py"))
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in files}


def code_digest(source: bytes) -> str:
    """Return the hex SHA-256 of what a module does: its syntax tree without texts that are no more than statements."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [each for each in body if not _is_text(each)]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


_AT_START = sources(_ROOT)
"""Taken when this module is imported: what is edited while a study runs computes nothing in it."""


@functools.cache
def source_digest(module: Path) -> str:
    """Digest a module and what it imports of ours, as they were when this process began."""
    digest = hashlib.sha256()
    for name in code_files(module.resolve().relative_to(_ROOT), _ROOT):
        source = _AT_START.get(name) or (_ROOT / name).read_bytes()
        of_file = code_digest(source) if name.endswith(".py") else hashlib.sha256(source).hexdigest()
        digest.update(f"{name}\0{of_file}".encode())
    return digest.hexdigest()
