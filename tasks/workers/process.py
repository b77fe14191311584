"""What a step's process owes its driver: to die with it, to stay quiet, to leave a start token and a log.

`.cache/steps/<step>.json` holds the token, then wall-clock seconds and peak memory; `.cache/steps/<step>.log` the
log. No step depends on either.
"""

import errno
import json
import logging
import os
import re
import resource
import shutil
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nirvana.device import PeakAnonymous
from tasks.tracking.loopback import keep_loopback_direct
from tasks.tracking.redaction import redact_logs
from tasks.workers.child import DRIVER_PID

RECORDS = Path(".cache/steps")
ERROR_PREFIX = "error: "
WARNING_PREFIX = "warning: "

_LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"
_LOG_LINE = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR|CRITICAL) (.*)$")

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_WORDS = ("no space left on device", "disk quota exceeded", "file too large", "disk is full", "os error 28")

_QUIET = {
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what deterministic CUDA matrix products ask for
}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def prepare_environment(threads: int, online: bool) -> None:
    """Set threads, telemetry and offline switches; call before torch, transformers or datasets are imported."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(threads)
    keep_loopback_direct()
    # Waiting threads sleep: on a machine shared with others, spinning doubles the CPU time of every operation.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for variable, value in (_QUIET if online else _QUIET | _OFFLINE).items():
        os.environ.setdefault(variable, value)


@contextmanager
def recorded(step: str) -> Iterator[None]:
    """Leave a start token, then the wall-clock seconds and peak memory, in .cache/steps/<step>.json."""
    record: dict[str, Any] = {
        "step": step,
        "token": uuid.uuid4().hex,
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    _write_record(step, record | {"outcome": "running"})
    start = time.monotonic()
    outcome = "failed"
    memory = PeakAnonymous()
    try:
        with memory:
            yield
        outcome = "completed"
    finally:
        peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        unit = 1 if sys.platform == "darwin" else 1024
        record |= {
            "outcome": outcome,
            "seconds": round(time.monotonic() - start, 3),
            "peak_rss_bytes": max(peaks) * unit,
            "peak_anonymous_bytes": memory.peak_bytes,
        }
        _write_record(step, record)


def read_record(step: str, root: Path | str = ".") -> dict[str, Any] | None:
    """Return what the last process of a step left, or None where it left nothing that can be read."""
    with suppress(OSError, ValueError, RecursionError):  # ValueError: not UTF-8, not JSON, a number without end
        content = json.loads((Path(root) / RECORDS / f"{step}.json").read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else None
    return None


def log_file(step: str) -> Path:
    """Return where a step's log is."""
    return RECORDS / f"{step}.log"


def _write_record(step: str, record: dict[str, Any]) -> None:
    # no fsync and no failure: losing a timing must not fail a step, least of all on the full disk that it reports
    with suppress(OSError):
        RECORDS.mkdir(parents=True, exist_ok=True)
        temporary = RECORDS / f".{step}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        target = RECORDS / f"{step}.json"
        if target.is_dir():  # not ours, and in the way: without a token the step would count as restored
            shutil.rmtree(target)
        temporary.replace(target)


def start_logging(step: str) -> None:
    """Log to .cache/steps/<step>.log, and to stderr unless a flow prints that file itself."""
    redact_logs()
    logging.raiseExceptions = False  # a full disk must not bury its own error under logging's
    handlers: list[logging.Handler] = []
    with suppress(OSError):
        RECORDS.mkdir(parents=True, exist_ok=True)
        to_file = logging.FileHandler(log_file(step), mode="w", encoding="utf-8")
        to_file.setFormatter(logging.Formatter(_LOG_FORMAT))
        handlers.append(to_file)
    if DRIVER_PID not in os.environ:
        to_stderr = logging.StreamHandler()
        to_stderr.setFormatter(logging.Formatter("%(levelname).1s %(message)s"))
        to_stderr.addFilter(lambda record: not record.getMessage().startswith(ERROR_PREFIX))
        handlers.append(to_stderr)
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)
    for noisy in ("httpx", "urllib3", "filelock", "alembic", "matplotlib", "fsspec", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def parsed_line(line: str) -> tuple[int, str]:
    """Return the level and the message of a line that `start_logging` wrote; any other line is information."""
    found = _LOG_LINE.match(line)
    return (logging.getLevelNamesMapping()[found[1]], found[2]) if found else (logging.INFO, line)


def last_error(step: str) -> str | None:
    """Return the cause that a step's log ends in, or None where it tells none."""
    log = log_file(step)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    for level, message in map(parsed_line, reversed(lines)):
        if level == logging.ERROR and message.startswith(ERROR_PREFIX):
            return message.removeprefix(ERROR_PREFIX)
    return None


def disk_full_line(error: BaseException, step: str, inputs: Iterable[Path]) -> str | None:
    """Return a one-line cause and remedy if the disk is full, whoever noticed it; else None.

    Python raises OSError, but safetensors and sqlite have errors of their own that only say it in words.
    """
    cause: BaseException | None = error
    while cause is not None and not _says_disk_full(cause):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    free = shutil.disk_usage(".").free
    needed = sum(_size(path) for path in inputs)
    where = getattr(cause, "filename", None)
    written = f" writing {where}" if where else ""
    return (
        f"disk full during {step}{written}: {_megabytes(free)} free, up to {_megabytes(needed)} needed "
        "(the size of its inputs); free space or move the checkout, then run the same command again"
    )


def _says_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return True
    return not isinstance(error, OSError) and any(words in str(error).lower() for words in _DISK_WORDS)


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.exists() else 0


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
