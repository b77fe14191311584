"""Nothing damaged passes: results and DVC's own files are held against their digests, and what differs is made again.

DVC believes what its caches say (see tasks/provenance/integrity.py). So every step that it brought up to date is
compared with dvc.lock afterwards. What differs goes, with the objects of the cache whose content is not their name, and
DVC is asked again: it then restores a good copy or computes one. `python -m flows.verify` (`make verify`) reads
everything afresh.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import flows.environment as environment
from flows.own_files import Say, cache_directory, drop_damaged_runs, mend_own_files, remove
from nirvana.errors import InputError
from nirvana.files import atomic_file
from tasks.provenance.integrity import (
    LOCK,
    Difference,
    Ledger,
    Recorded,
    differences,
    listing,
    recorded_outputs,
    said_files,
)
from tasks.registry import STEPS, step


def output_paths(name: str) -> list[Path]:
    """Return the outputs of a step that DVC keeps."""
    return [Path(out.path) for out in step(name).outs.values() if out.tracked]


def changed_in_place(name: str) -> list[Difference]:
    """Return the outputs of a step that were touched since they were last read, and are not what dvc.lock says."""
    ledger = Ledger()
    before = {path: _last_digests(path, ledger) for path in output_paths(name)}
    found = differences(output_paths(name), ledger)
    ledger.save()
    return [each for each in found if before[each.path] and before[each.path] != _last_digests(each.path, ledger)]


def _last_digests(path: Path, ledger: Ledger) -> dict[Path, str]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {file: digest for file in files if (digest := ledger.last(file))}


def drop_damaged_outputs(name: str, say: Say) -> bool:
    """Remove what is not what dvc.lock says of a step's outputs, so that DVC makes it again; tell whether any was.

    Args:
        name: The step, just brought up to date.
        say: Told each file that goes.
    """
    ledger = Ledger()
    found = differences(output_paths(name), ledger)
    for each in found:
        say(f"{said_files(each.files)}: not what {name} wrote (md5 of {each.path} in {LOCK}); made again")
        for file in each.files:
            remove(file)
        drop_damaged_objects(each.recorded.md5, ledger, say)
    ledger.save()
    return bool(found)


def drop_damaged_objects(md5: str, ledger: Ledger, say: Say, afresh: bool = False) -> bool:
    """Remove an object of DVC's cache, and those that a directory lists, where content and name differ."""
    directory, dropped = _object(md5), False
    names = [md5]
    if md5.endswith(".dir"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            names += [each["md5"] for each in json.loads(directory.read_bytes())]
    for name in names:
        dropped |= _drop_if_damaged(_object(name), ledger, say, afresh)
    return dropped


def prepare_cache(name: str, say: Say) -> None:
    """Make DVC's cache fit for what DVC is about to ask of it: objects that it may restore are whole, others there.

    Without the object of an output DVC would compute a step again although its outputs are whole in the workspace, and
    it never replaces an object that is there, however damaged.
    """
    ledger, recorded = Ledger(), recorded_outputs()
    for path in output_paths(name):
        said = recorded.get(path)
        if said is None:
            continue
        if not path.exists():
            drop_damaged_objects(said.md5, ledger, say)
        elif said.md5.endswith(".dir"):
            _drop_if_damaged(_object(said.md5), ledger, say)
        if ledger.digest(path) == said.md5:
            _refill(path, said.md5, ledger)
    ledger.save()


def _refill(path: Path, md5: str, ledger: Ledger) -> None:
    """Put back objects that the cache lacks of an output that is whole."""
    if not path.is_dir():
        _put(_object(md5), lambda target: shutil.copyfile(path, target))
        return
    tree = ledger.tree(path)
    for file, digest in tree.items():
        _put(_object(digest), lambda target, file=file: shutil.copyfile(path / file, target))  # type: ignore[misc]
    _put(_object(md5), lambda target: target.write_bytes(listing(tree)))


def _put(file: Path, write: Callable[[Path], object]) -> None:
    if not file.exists():
        with atomic_file(file) as temporary:
            write(temporary)
        file.chmod(0o444)  # as DVC protects it


def objects() -> Path:
    """Return where DVC's cache has its objects."""
    return cache_directory() / "files/md5"


def _object(md5: str) -> Path:
    return objects() / md5[:2] / md5[2:]


def _drop_if_damaged(file: Path, ledger: Ledger, say: Say, afresh: bool = False) -> bool:
    expected = (file.parent.name + file.name).removesuffix(".dir")
    try:
        if ledger.md5(file, afresh) == expected or ledger.md5(file, afresh=True) == expected:
            return False
        file.unlink()
    except FileNotFoundError:
        return False
    say(f"{file}: content and name differ; dropped from DVC's cache, which it would have come back from")
    return True


def recorded_of(name: str) -> list[Recorded]:
    """Return what dvc.lock says of a step's outputs."""
    recorded = recorded_outputs()
    return [recorded[path] for path in output_paths(name) if path in recorded]


def give_copies(name: str, logger: Any) -> None:
    """Turn outputs that share their bytes with DVC's cache, as earlier releases linked them, into files of their own.

    A setting of cache.type in .dvc/config.local that asks for links is left alone.
    """
    linked = [path for path in output_paths(name) if any(_is_linked(file) for file in _files(path))]
    if not linked:
        return
    from dvc.repo import Repo

    with Repo(".", _wait_for_lock=True) as repo:
        if {"hardlink", "symlink"} & set(repo.cache.local.cache_types):
            return
        for path in linked:
            logger.info("%s was linked with DVC's cache; it becomes a copy, so that an edit cannot change both", path)
            repo.unprotect(str(path))


def _files(path: Path) -> Iterator[Path]:
    return (file for file in path.rglob("*") if file.is_file()) if path.is_dir() else iter([path])


def _is_linked(file: Path) -> bool:
    with suppress(OSError):
        return file.is_symlink() or file.stat().st_nlink > 1
    return False


def verify(say: Say) -> list[str]:
    """Read every output, cache object and run afresh; drop damaged cache entries, name damaged outputs.

    Args:
        say: Told what is damaged.

    Returns:
        What is wrong, one line each.
    """
    wrong: list[str] = []

    def tell(line: str) -> None:
        wrong.append(line)
        say(line)

    try:
        mend_own_files(tell)
        ledger = Ledger()
        paths = [path for each in STEPS for path in output_paths(each.name)]
        for each in differences(paths, ledger, afresh=True):
            tell(
                f"{said_files(each.files)}: not what {each.recorded.stage} wrote (md5 of {each.path} in {LOCK}); "
                "`make run` restores it or computes it again"
            )
    except InputError as error:
        tell(str(error))
        ledger = Ledger()
    drop_damaged_runs(tell, afresh=True)
    for file in sorted(objects().glob("*/*")):
        if len(file.parent.name + file.name.removesuffix(".dir")) == 32:
            _drop_if_damaged(file, ledger, tell, afresh=True)
    ledger.save()
    with suppress(InputError):  # said above
        for declared in STEPS:
            prepare_cache(declared.name, tell)
    return wrong


def main() -> int:
    """Verify the checkout; the exit status is 0 if all is whole, 1 if something was damaged."""
    import os

    os.chdir(environment.ROOT)
    start = time.monotonic()
    wrong = verify(lambda line: sys.stdout.write(f"damaged: {line}\n"))
    known = sum(path.exists() for each in STEPS for path in output_paths(each.name))
    seconds = time.monotonic() - start
    if wrong:
        sys.stdout.write(f"{len(wrong)} damaged; `make run` makes them again ({seconds:.1f} s)\n")
        return 1
    sys.stdout.write(f"whole: {known} outputs, DVC's cache and its records are what {LOCK} says ({seconds:.1f} s)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
