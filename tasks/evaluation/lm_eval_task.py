"""Writing items as a task that lm-eval finds in a directory and reads offline."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from nirvana.files import atomic_file

OFFLINE_TASKS = ("cloze", "continuation")
"""Tasks made here from the evaluation documents; all others fetch their data from the hub."""


def write_task(template: str, items: Sequence[Mapping[str, Any]], directory: Path) -> Path:
    """Write items and an lm-eval task from its template into a directory.

    `TaskManager(include_path=directory, include_defaults=False)` finds the task; the data's cache stays in the
    directory too.

    Args:
        template: File in templates/ that is named like its task.
        items: One JSON object an item.
        directory: Made if need be; may hold other tasks.

    Returns:
        The task's YAML file.
    """
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    task_file = directory / template
    data_file = task_file.with_suffix(".jsonl")
    with atomic_file(data_file) as temporary:
        temporary.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    text = Template((Path(__file__).parent / "templates" / template).read_text(encoding="utf-8"))
    # a JSON string is a YAML string
    paths = {"data_file": json.dumps(str(data_file)), "cache_dir": json.dumps(str(directory / "cache"))}
    with atomic_file(task_file) as temporary:
        temporary.write_text(text.substitute(paths), encoding="utf-8")
    return task_file
