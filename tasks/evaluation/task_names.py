"""Whether lm-eval knows a task, without its index of 14,683: that takes 19 s to build."""

import importlib.util
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from nirvana.errors import InputError
from tasks.evaluation.lm_eval_task import OFFLINE_TASKS

_NAMED = re.compile(rb"^[\"']?(?:task|group|tag)[\"']?\s*:(.*(?:\n[ \t]*-.*)*)", re.MULTILINE)


def check_task_names(names: Sequence[str]) -> None:
    """Check that each name is ours, `paper` or one of lm-eval's.

    A name that a scan of its files finds is known; for any other the index decides.

    Raises:
        InputError: If one is unknown.
    """
    wanted = {name for name in names if name not in (*OFFLINE_TASKS, "paper")}
    if not wanted:
        return
    for text in _declared(wanted):
        wanted -= {name for name in wanted if _holds(text, name)}
        if not wanted:
            return
    from lm_eval.tasks import TaskManager

    known = TaskManager(include_defaults=True).all_tasks
    unknown = sorted(wanted - set(known))
    if unknown:
        raise InputError(unknown_task(unknown[0], known))


def unknown_task(name: str, known: Sequence[str]) -> str:
    """Return what to say of a name that nobody knows."""
    import difflib

    close = difflib.get_close_matches(name, [*known, *OFFLINE_TASKS, "paper"], n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "`lm_eval ls tasks` lists them"
    shown = name if len(name) <= 60 else f"{name[:57]}..."
    return f"evaluation.tasks: expected {', '.join(OFFLINE_TASKS)}, paper or a task of lm-eval, got {shown!r}; {hint}"


def _declared(wanted: Collection[str]) -> Iterator[bytes]:
    """Yield what lm-eval's files say after `task:`, `group:` and `tag:`; first the files that are named like a task."""
    package = importlib.util.find_spec("lm_eval")
    places = [Path(place) / "tasks" for place in (package.submodule_search_locations or ())] if package else []
    files = [
        os.path.join(folder, file)  # noqa: PTH118 - 14,683 of them: a Path each takes longer than reading
        for place in places
        for folder, _, names in os.walk(place)
        for file in names
        if file.endswith((".yaml", ".yml"))
    ]
    likely = {f"{name}{end}" for name in wanted for end in (".yaml", ".yml")}
    files.sort(key=lambda file: os.path.basename(file) not in likely)  # noqa: PTH119
    for file in files:
        with open(file, "rb") as opened:  # noqa: PTH123
            yield from _NAMED.findall(opened.read())


def _holds(text: bytes, name: str) -> bool:
    if name.encode(errors="replace") not in text:
        return False
    return name in {part.strip(" \t\"'-[],\r") for part in re.split(r"[\n,]", text.decode(errors="replace"))}
