"""Flows in toy checkouts: run them, and ask Prefect and MLflow what they saw."""

import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import Request, urlopen

from toy import command

from tasks.registry import STEPS


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    """Wait until something holds; an AssertionError if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def flow(path: Path, api: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    return command(path, sys.executable, "-m", "flows.pipeline", check=check, PREFECT_API_URL=api, **variables)


def outputs(path: Path) -> dict[str, bytes]:
    """Return the bytes of everything that DVC keeps."""
    found = {}
    for step in STEPS:
        for out in step.outs.values():
            files = sorted((path / out.path).rglob("*")) if (path / out.path).is_dir() else [path / out.path]
            found.update({str(file.relative_to(path)): file.read_bytes() for file in files if out.tracked})
    return found


def mlflow_runs(path: Path) -> list[tuple[str, str]]:
    """Return (status, name) of every MLflow run, oldest first."""
    with sqlite3.connect(path / "mlflow.db") as database:
        return database.execute("SELECT status, name FROM runs ORDER BY start_time").fetchall()


def ask(api: str, what: str, query: dict) -> list[dict]:
    request = Request(f"{api}/{what}/filter", json.dumps(query).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=30) as answer:
        return json.load(answer)


def last_flow_run(api: str) -> tuple[dict, dict[str, str]]:
    """Return the newest flow run and the state name of each of its tasks."""

    run = ask(api, "flow_runs", {"sort": "START_TIME_DESC", "limit": 1})[0]
    tasks: dict[str, str] = {}

    def all_there() -> bool:  # task states arrive by events, a moment later
        found = ask(api, "task_runs", {"flow_runs": {"id": {"any_": [run["id"]]}}})
        tasks.update({task["name"]: task["state_name"] for task in found})
        return bool(tasks) and not {"Pending", "Running"} & set(tasks.values())

    wait_for(all_there, 30)
    return run, tasks
