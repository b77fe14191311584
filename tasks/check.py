"""What can be known early: `python -m tasks.check` holds params.yaml against model, corpus and machine.

The flow asks once the model and the corpus are there, before the first step that computes; by hand it can be asked
before `dvc repro` too. What was found sound is remembered in .cache/checks by everything that it depends on.
"""

import hashlib
import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from nirvana.errors import InputError
from nirvana.files import read_json, write_json
from tasks.params import load_params

if TYPE_CHECKING:
    from tasks.params import Params

MODEL, CORPUS = Path("data/model"), Path("data/corpus")
CHECKS = Path(".cache/checks")
_CODE = ("nirvana", "tasks")
_CHECKED = {"checked": True}
_LIBRARIES = ("lm_eval", "transformers", "torch")


def remembered_file(params: "Params") -> Path | None:
    """Return where it is kept that these parameters fit this model and corpus; None before both are there."""
    config, documents = MODEL / "config.json", CORPUS / "documents.jsonl"
    if not config.is_file() or not documents.is_file():
        return None
    files = [documents, *sorted(file for file in MODEL.iterdir() if file.is_file())]
    depends_on = {
        "params": asdict(params),
        # size and time: a byte changed in place is for the steps to find, and their digests
        "files": [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        "code": _code_digest(),
        "libraries": [_version(name) for name in _LIBRARIES],
    }
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    return CHECKS / f"{digest[:32]}.json"


def is_sound(params: "Params") -> bool:
    """Tell whether nothing has changed since these parameters were found to fit."""
    try:
        file = remembered_file(params)
        return file is not None and read_json(file) == _CHECKED
    except (InputError, OSError):
        return False


def check(params: "Params") -> list[str]:
    """Check what can be checked with what is there.

    Returns:
        Warnings, a line each.

    Raises:
        InputError: At the first thing that cannot work; one line with the key, what was expected and what to do.
    """
    from tasks.evaluation.task_names import check_task_names

    check_task_names(params.evaluation.tasks)
    if not (MODEL / "config.json").is_file():
        return [
            f"no model in {MODEL} yet: only params.yaml was checked; `dvc repro fetch_model fetch_corpus` gets both"
        ]
    from tasks.checks.model import check_model, shortages
    from tasks.workers.process import prepare_environment

    prepare_environment(params.compute.threads, online=False)
    check_model(params, MODEL)
    warnings = list(shortages(params, MODEL))
    if not (CORPUS / "documents.jsonl").is_file():
        return [*warnings, f"no corpus in {CORPUS} yet: the text was not checked; `dvc repro fetch_corpus` gets it"]
    from tasks.checks.text import check_text

    check_text(params, MODEL, CORPUS)
    return warnings


def _code_digest() -> str:
    state = hashlib.sha256()
    for package in _CODE:
        for file in sorted(Path(package).rglob("*.py")):
            state.update(f"{file}\0{file.stat().st_size}\0{file.stat().st_mtime_ns}\n".encode())
    return state.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def main() -> int:
    """Check, say what was found, and return the exit status: 0 sound, 2 not, 1 a defect of ours."""
    from tasks.tracking.redaction import redact, redact_logs
    from tasks.workers.process import ERROR_PREFIX, WARNING_PREFIX

    redact_logs()
    os.environ.setdefault("TQDM_DISABLE", "1")  # it is read when tqdm is imported
    try:
        params = load_params()
        warnings = check(params)
    except InputError as error:
        sys.stderr.write(f"{ERROR_PREFIX}{redact(str(error))}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("NIRVANA_TRACEBACK"):
            raise
        _remember(params)  # it would fail again, each time
        cause = redact(" ".join(f"{type(error).__name__}: {error}".split())[:300])
        sys.stderr.write(f"{ERROR_PREFIX}the check itself failed with {cause}; NIRVANA_TRACEBACK=1 shows where\n")
        return 1
    for warning in warnings:
        sys.stderr.write(f"{WARNING_PREFIX}{redact(warning)}\n")
    _remember(params)
    sys.stdout.write("nothing found that cannot work\n" if not warnings else "")
    return 0


def _remember(params: "Params") -> None:
    # a full disk, a file in the way: then it is checked again next time
    with suppress(OSError):
        if (file := remembered_file(params)) is not None:
            write_json(file, _CHECKED)


if __name__ == "__main__":
    sys.exit(main())
