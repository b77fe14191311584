"""Killed drivers, other processes, clones and experiments aside: no writer is left behind, nothing is computed twice.

Real Prefect, DVC, MLflow and git in a checkout of toy steps.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy import command, commit, dvc, environment, runs, set_param
from toy_flows import flow, mlflow_runs, outputs, wait_for

from tasks.registry import STEPS
from tasks.registry import paths as step_paths

pytestmark = pytest.mark.slow
NAMES = [step.name for step in STEPS]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("driver", "number"), [("flow", signal.SIGKILL), ("dvc", signal.SIGKILL), ("flow", signal.SIGTERM)]
)
def test_a_killed_driver_leaves_no_writer_and_the_same_command_finishes(
    checkout: Path, api: str, driver: str, number: signal.Signals
) -> None:
    set_param(checkout, "pruning_ratio: 0.2 ", "pruning_ratio: 0.5 ")
    modules = {"flow": ["flows.pipeline"], "dvc": ["dvc", "repro"]}[driver]
    process = subprocess.Popen(
        [sys.executable, "-m", *modules],
        cwd=checkout,
        env=environment(PREFECT_API_URL=api, TOY_SLEEPS="prune"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    asleep = checkout / ".cache/asleep"
    try:
        wait_for(asleep.exists, 60)
        wait_for(asleep.read_text, 5)
        step = int(asleep.read_text())
        assert is_alive(step)
        os.kill(process.pid, number)
        wait_for(lambda: not is_alive(step), 3)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
    assert not (checkout / "artifacts/checkpoint").exists()
    time.sleep(3)  # longer than the step would have slept on
    assert not (checkout / ".cache/woke").exists()
    assert runs(checkout) == ["score_pool", "allocate", "prune"]
    if driver == "flow":
        flow(checkout, api)
    else:
        dvc(checkout, "repro")
    assert runs(checkout) == ["prune", "recover", "evaluate", "benchmark", "report"]


def test_the_flow_waits_for_another_process_and_says_for_whom(checkout: Path, api: str) -> None:
    set_param(checkout, "pruning_ratio: 0.2 ", "pruning_ratio: 0.6 ")
    other = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro"],
        cwd=checkout,
        env=environment(TOY_SLEEPS="prune"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for((checkout / ".cache/asleep").exists, 60)
        done = flow(checkout, api)
    finally:
        other.wait(60)
    assert other.returncode == 0
    assert f"waiting for process {other.pid} (" in done.stdout + done.stderr
    assert runs(checkout) == ["score_pool", "allocate", "prune", "recover", "evaluate", "benchmark", "report"]


def test_experiments_run_aside_join_the_same_history(checkout: Path) -> None:
    dvc(checkout, "exp", "run", "--temp", "-S", "allocation.pruning_ratio=0.7")
    assert [status for status, _ in mlflow_runs(checkout)] == ["FINISHED"] * 2
    dvc(checkout, "exp", "run", "-S", "allocation.pruning_ratio=0.7")
    assert len(mlflow_runs(checkout)) == 2
    assert "0.7" in dvc(checkout, "params", "diff").stdout
    assert "reports/evaluation.json" in dvc(checkout, "metrics", "diff").stdout


def test_a_second_clone_pulls_and_has_nothing_to_do(checkout: Path, tmp_path: Path, api: str) -> None:
    dvc(checkout, "remote", "add", "-d", "store", str(tmp_path / "remote"))
    dvc(checkout, "push")
    commit(checkout, "remote")
    clone = tmp_path / "clone"
    command(tmp_path, "git", "clone", "-q", str(checkout), str(clone))
    dvc(clone, "pull")
    (clone / ".cache").mkdir()
    done = dvc(clone, "repro")
    assert "up to date" in done.stdout
    assert runs(clone) == []
    assert outputs(clone) == outputs(checkout)
    # its own MLflow history is empty: the flow records there, and computes nothing
    flow(clone, api)
    assert runs(clone) == []
    assert [status for status, _ in mlflow_runs(clone)] == ["FINISHED"]


def test_histories_stay_in_the_checkout_and_a_running_ui_is_used(checkout: Path) -> None:
    script = (
        "import flows.{module}; from prefect.settings import get_current_settings as s; print(s().home, s().api.url)"
    )
    with socket.socket() as page:
        page.bind(("127.0.0.1", 0))
        page.listen()
        url = f"http://127.0.0.1:{page.getsockname()[1]}/api"
        for module in ("pipeline", "serve"):
            home = checkout / ".prefect"
            seen = command(checkout, sys.executable, "-c", script.format(module=module)).stdout.split()
            assert seen == [str(home), "None"]
            home.mkdir(exist_ok=True)
            (home / "ui.json").write_text(json.dumps({"pid": os.getpid(), "api": url}))
            seen = command(checkout, sys.executable, "-c", script.format(module=module)).stdout.split()
            assert seen == [str(home), url]
            (home / "ui.json").unlink()


def test_step_paths_are_relative() -> None:
    for name in NAMES:
        for mapping in step_paths(name):
            assert not any(path.is_absolute() for path in mapping.values())
