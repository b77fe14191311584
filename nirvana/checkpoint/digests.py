"""What a checkpoint's files were when it was written: their SHA-256, in one small file beside them.

A checkpoint travels by copy, and its compensated weights cannot be cut from the dense model again to compare. So a bit
that changed on the way, in weights, configuration, plan or tokenizer, is told from the files alone.
"""

from collections.abc import Mapping
from pathlib import Path

from nirvana.errors import InputError
from nirvana.fields import Fields
from nirvana.files import read_json, sha256_file, write_json

DIGESTS_NAME = "nirvana_files.json"
"""Name of that file inside a checkpoint or an export."""


def write_digests(directory: Path, known: Mapping[str, str] | None = None) -> None:
    """Write the digest of every file below a directory, as the last of its files.

    Args:
        directory: A checkpoint that is whole but for this.
        known: Hex SHA-256 of files that were digested while they were written, by name.
    """
    known = known or {}
    names = sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file())
    files = {name: known.get(name) or sha256_file(directory / name) for name in names if name != DIGESTS_NAME}
    write_json(directory / DIGESTS_NAME, {"schema_version": 1, "sha256": files})


def check_digests(directory: Path) -> bool:
    """Compare the files of a checkpoint with what they were when it was written.

    Files that were added since are not looked at.

    Returns:
        Whether there was something to compare with: checkpoints of earlier releases have nothing.

    Raises:
        InputError: If a file is missing or differs; it is named.
    """
    file = directory / DIGESTS_NAME
    if not file.is_file():
        return False
    listed = Fields(read_json(file), str(file), "copy the checkpoint again or prune again").inner("sha256")
    for name in listed.keys():
        expected = listed.text(name)
        if name.startswith("/") or ".." in Path(name).parts:
            raise InputError(f"{file}: expected files of this directory, got {name!r}; copy the checkpoint again")
        if not (directory / name).is_file():
            raise InputError(f"{directory / name}: expected the file that was written here, found none; copy it again")
        found = sha256_file(directory / name)
        if found != expected:
            raise InputError(
                f"{directory / name}: expected what was written here (sha256 {expected[:16]}…, {DIGESTS_NAME}), got "
                f"{found[:16]}…: damaged or changed since; copy the checkpoint again, prune again, or take "
                f"{DIGESTS_NAME} away if it was changed on purpose"
            )
    return True
