"""The Hugging Face hub: the one place that may leave offline mode, and only for a source that names the hub.

`HF_ENDPOINT` is honoured by huggingface_hub itself.
"""

import hashlib
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nirvana.errors import InputError
from nirvana.files import sha256_file
from tasks.sources.source import HubSource

_LOG = logging.getLogger(__name__)

CACHE = Path(".cache/hub")


@contextmanager
def online() -> Iterator[None]:
    """Lift offline mode for the hub's and the datasets' client, which read it from the environment on import."""
    import datasets.config
    import huggingface_hub.constants

    switches: list[tuple[Any, str, Any]] = [
        (huggingface_hub.constants, "HF_HUB_OFFLINE", False),
        (datasets.config, "HF_HUB_OFFLINE", False),
        (datasets.config, "HF_DATASETS_OFFLINE", False),
        (datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False),  # a request to another host that fetches nothing
        (huggingface_hub.constants, "HF_HUB_CACHE", str(CACHE)),  # not the home directory
    ]
    before = [getattr(module, name) for module, name, _ in switches]
    try:
        for module, name, value in switches:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _), value in zip(switches, before, strict=True):
            setattr(module, name, value)


@contextmanager
def hub_errors(source: HubSource) -> Iterator[None]:
    """Turn what the hub's client raises into one line that names the source."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HTTPError,  # of the HTTP client that this huggingface_hub is built on
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = f"hf:{source.repository}@{source.revision}"
    try:
        yield
    except GatedRepoError:
        raise InputError(f"{name}: access is gated; accept its terms on the hub and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise InputError(f"{name}: the hub has no such revision; choose a commit or tag that exists") from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{name}: the hub has no such repository, or it is private; check the name or set HF_TOKEN"
        ) from None
    except (LocalEntryNotFoundError, HTTPError, ConnectionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{name}: the hub could not be reached ({reason}); check the network and HF_ENDPOINT, then run again"
        ) from error


def resolve_commit(source: HubSource, kind: str) -> tuple[str, list[str]]:
    """Return the commit that a revision stands for, and the files of the repository at it.

    Args:
        source: Repository and revision.
        kind: "model" or "dataset".
    """
    from huggingface_hub import HfApi

    info: Any = HfApi().repo_info(source.repository, repo_type=kind, revision=source.revision)
    if not info.sha:
        raise InputError(f"hf:{source.repository}@{source.revision}: the hub names no commit; pin a commit after @")
    if not re.fullmatch(r"[0-9a-f]{40}", source.revision):
        _LOG.warning(
            "hf:%s@%s is a branch or tag and can move; it is commit %s now: pin that",
            source.repository,
            source.revision,
            info.sha,
        )
    return info.sha, [sibling.rfilename for sibling in info.siblings or []]


def download_early(source: HubSource, commit: str, name: str) -> Path:
    """Download one file of a model repository and return the cache's directory; `download_files` finds it there."""
    from huggingface_hub import snapshot_download

    cache = _cache(source, commit)
    snapshot_download(source.repository, revision=commit, local_dir=cache, allow_patterns=[name])
    return cache


def download_files(source: HubSource, commit: str, names: list[str], directory: Path) -> None:
    """Download files of a model repository into a directory, by way of a cache that lets a killed run resume.

    Args:
        source: Repository; its revision is not used.
        commit: The commit to download.
        names: Files, as paths in the repository.
        directory: Existing directory that receives them.
    """
    from huggingface_hub import snapshot_download

    cache = _cache(source, commit)
    _LOG.info("downloading %d files of %s at %s", len(names), source.repository, commit)
    snapshot_download(source.repository, revision=commit, local_dir=cache, allow_patterns=names)
    for name in names:
        _check_download(cache, name)
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(cache / name, directory / name)
    shutil.rmtree(cache)


def _check_download(cache: Path, name: str) -> None:
    """Compare a file with the digest that the hub gave it: of a part that was there before, only its size was checked.

    Raises:
        InputError: If it differs; the file is gone then, so that the next run downloads it anew.
    """
    from huggingface_hub._local_folder import read_download_metadata

    known = read_download_metadata(cache, name)
    etag = "" if known is None else known.etag
    file = cache / name
    if re.fullmatch("[0-9a-f]{64}", etag):  # of large files
        found = sha256_file(file)
    elif re.fullmatch("[0-9a-f]{40}", etag):  # of others, as git names them
        content = file.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    else:
        return
    if found != etag:
        file.unlink()
        raise InputError(f"{name}: expected what the hub has ({etag}), got {found}; run the same command again")


def _cache(source: HubSource, commit: str) -> Path:
    return CACHE / f"{source.repository.replace('/', '--')}@{commit}"
