"""What the flow says before the first step that costs: what cannot work, and what is coming.

Each in a process of its own, for it imports torch; a run of which nothing changed starts neither.
"""

import subprocess
import sys
from contextlib import suppress
from typing import Any

from nirvana.files import atomic_file
from tasks.check import is_sound
from tasks.estimates.table import shown_file
from tasks.params import load_params
from tasks.workers.process import ERROR_PREFIX, WARNING_PREFIX

_CHECK_SECONDS = 300


def fault_known_early(logger: Any) -> str | None:
    """Return what cannot work of what params.yaml asks, before it costs anything; warnings are shown."""
    if is_sound(load_params()):
        return None
    command = [sys.executable, "-m", "tasks.check"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_CHECK_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.warning("not checked ahead (%s); a step says what it cannot do", type(error).__name__)
        return None
    *others, last = done.stderr.splitlines() or [""]
    if done.returncode == 2 and last.startswith(ERROR_PREFIX):
        return last.removeprefix(ERROR_PREFIX)
    if done.returncode:  # of ours: no reason to stop what may work
        logger.warning("not checked ahead (%s); a step says what it cannot do", last[-300:])
        return None
    for line in [*others, last]:
        if line.startswith(WARNING_PREFIX):
            logger.warning("%s", line.removeprefix(WARNING_PREFIX))
    return None


def show_estimate() -> None:
    """Say what is coming, where model or settings are new."""
    file = shown_file(load_params())
    if file is None or file.exists():
        return
    command = [sys.executable, "-m", "tasks.estimates"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        said = done.stdout if done.returncode == 0 else f"no estimate: {done.stderr.strip()[-300:]}\n"
    except subprocess.TimeoutExpired:
        said = "no estimate: it took more than two minutes\n"
    if not file.exists():  # kept too: a run of which nothing changed pays for no second try
        with suppress(OSError), atomic_file(file) as temporary:
            temporary.write_text(said, encoding="utf-8")
    sys.stderr.write(said)
