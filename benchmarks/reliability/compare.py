"""What two checkouts have to have in common: bytes, dvc.lock, no leftovers, and one MLflow run that says the same."""

import json
import re
import sqlite3
from contextlib import closing
from hashlib import md5
from pathlib import Path
from typing import Any

import yaml

from tasks.record import DIGEST_TAG
from tasks.registry import STEPS

MEASURED = ("reports/benchmark.json", "reports/report.html", "reports/mlflow_run.json")
"""Outputs that hold measured times, or when and where the run was recorded: another run's differ."""

_MEASURING = ("benchmark", "report", "record")
_RESULTS = ("data", "artifacts", "reports")


def output_files(path: Path, until: str = STEPS[-1].name) -> dict[str, bytes]:
    """Return what the steps up to one wrote, less what is measured."""
    found = {file.relative_to(path).as_posix(): file for file in _outputs(path, until)}
    return {name: file.read_bytes() for name, file in found.items() if name not in MEASURED}


def _outputs(path: Path, until: str) -> list[Path]:
    names = [step.name for step in STEPS]
    places = [path / out.path for step in STEPS[: names.index(until) + 1] for out in step.outs.values()]
    files = (file for place in places for file in (sorted(place.rglob("*")) if place.is_dir() else [place]))
    return [file for file in files if file.is_file()]


def differing(finished: Path, path: Path, until: str = STEPS[-1].name) -> list[str]:
    """Return what differs between the steps up to one of two checkouts, a line each.

    Compared: every byte of what they wrote, less what is measured; what dvc.lock says of it; that nothing else lies
    beside it; of what is measured all that is no number or time; and the MLflow run, less its measured figures.
    """
    expected, found = output_files(finished, until), output_files(path, until)
    wrong = [name for name in expected if found.get(name) != expected[name]] + sorted(found.keys() - expected)
    if not (path / "dvc.lock").exists() or _locked(path, until) != _locked(finished, until):
        wrong.append("dvc.lock")
    known = {file.relative_to(path) for file in _outputs(path, until)}
    lying = {file.relative_to(path) for part in _RESULTS for file in (path / part).rglob("*") if file.is_file()}
    wrong += [f"{file} is left over" for file in sorted(lying - known) if file.name != ".gitkeep"]
    return wrong + _measured(finished, path, until)


def _locked(path: Path, until: str) -> dict[str, Any]:
    """Return what dvc.lock says of the stages up to one, their times and modes left out."""
    stages = yaml.safe_load((path / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    names = [step.name for step in STEPS[: [step.name for step in STEPS].index(until) + 1]]
    return {name: stages.get(name) for name in names if name not in _MEASURING}


def _measured(finished: Path, path: Path, until: str) -> list[str]:
    names = [step.name for step in STEPS]
    wrong = []
    if names.index(until) >= names.index("benchmark"):
        wrong += [name for name in MEASURED[:1] if _shape(finished / name) != _shape(path / name)]
    if names.index(until) >= names.index("report"):
        text = (path / MEASURED[1]).read_text(encoding="utf-8")
        wrong += [] if text.rstrip().endswith("</html>") and _is_locked(path, MEASURED[1]) else [MEASURED[1]]
    if until == "record":
        wrong += _wrong_runs(finished, path)
    return wrong


def _wrong_runs(finished: Path, path: Path) -> list[str]:
    try:
        found, (expected,) = recorded_runs(path), recorded_runs(finished)
    except sqlite3.Error as error:
        return [f"mlflow.db ({error})"]
    same = [run for run in found if run[1] == expected[1]]
    return [] if same == [expected] else [f"the MLflow run ({len(same)} of {len(found)} are this experiment's)"]


def _shape(file: Path) -> Any:
    """Return a JSON document with every figure that was measured replaced."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return str(error)
    return _without_figures(content)


def _without_figures(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_figures(each) for key, each in value.items() if key not in ("warning", "peak_bytes")}
    if isinstance(value, list):
        return [_without_figures(each) for each in value]
    return "a number" if isinstance(value, float) else value


def _is_locked(path: Path, name: str) -> bool:
    digest = md5((path / name).read_bytes(), usedforsecurity=False).hexdigest()
    return bool(re.search(rf"path: {re.escape(name)}\n\s+hash: md5\n\s+md5: {digest}\n", _lock(path)))


def _lock(path: Path) -> str:
    return (path / "dvc.lock").read_text(encoding="utf-8")


def measured_as_locked(path: Path) -> list[str]:
    """Return the measured outputs that are not what dvc.lock says of them."""
    return [name for name in MEASURED[:2] if not _is_locked(path, name)]


def recorded_runs(path: Path) -> list[tuple[str, str, dict[str, str], dict[str, float]]]:
    """Return status, digest, parameters and metrics, less the measured ones, of every experiment's run in mlflow.db."""
    with closing(sqlite3.connect(f"file:{path / 'mlflow.db'}?mode=ro", uri=True)) as database:
        query = "SELECT runs.run_uuid, status, value FROM runs JOIN tags USING (run_uuid) WHERE key = ?"
        query += " AND lifecycle_stage = 'active'"
        found = []
        for run, status, digest in database.execute(query, (DIGEST_TAG,)).fetchall():
            parameters = dict(database.execute("SELECT key, value FROM params WHERE run_uuid = ?", (run,)))
            latest = database.execute("SELECT key, value FROM latest_metrics WHERE run_uuid = ?", (run,))
            metrics = {key: value for key, value in latest if not key.startswith("benchmark.")}
            found.append((status, digest, parameters, metrics))
    return found
