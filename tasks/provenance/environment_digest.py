"""What a value depends on beyond its inputs: this code, the libraries, the machine; and a quick look at files.

Workers of another machine say the same about theirs before they are trusted.
"""

import functools
import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

_LIBRARIES = ("torch", "transformers", "numpy", "safetensors")
_ENDS = 1 << 20


@functools.cache
def code_digest() -> str:
    """Digest this project's source files as they were when this process first asked.

    A worker that outlives an edit still runs what it imported: its answer must stay the old one.
    """
    import nirvana

    digest = hashlib.sha256()
    for root in (Path(nirvana.__file__).parent, Path(__file__).parents[1]):
        for file in sorted(root.rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """Return the versions of what computes."""
    return {name: version(name) for name in _LIBRARIES}


def machine() -> str:
    """Return the kind of processor, e.g. x86_64."""
    return platform.machine()


def glance(path: Path) -> str:
    """Digest the names, sizes and both ends of a file, or of all files of a directory; `nothing` if there is none.

    Enough to tell two models or two pools apart, and milliseconds where the whole of a model takes minutes.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    if not files:
        return "nothing"
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path).as_posix()}\0{size}\n".encode())
        with file.open("rb") as content:
            digest.update(content.read(_ENDS))
            content.seek(max(_ENDS, size - _ENDS))
            digest.update(content.read())
    return digest.hexdigest()
