"""The flow and DVC drive the same steps: never a wrong result, never a recomputation, never a writer left behind.

Real Prefect, DVC, MLflow and git in a checkout of toy steps.
"""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from toy import command, commit, dvc, environment, runs, set_param, toy_checkout

from tasks.registry import STEPS
from tasks.registry import paths as step_paths

pytestmark = pytest.mark.slow
NAMES = [step.name for step in STEPS]
TOYS = [name for name in NAMES if name != "record"]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Prefect server for all tests: each flow's own would take ten seconds to start."""
    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    variables = environment(PREFECT_HOME=str(home), PREFECT_API_URL=url, PREFECT_SERVER_ANALYTICS_ENABLED="false")
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        env=variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(lambda: answers(f"{url}/health"), 120)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, api: str) -> Path:
    """A checkout in which the flow has run once, from nothing."""
    path = toy_checkout(tmp_path_factory.mktemp("finished"))
    done = flow(path, api)
    assert runs(path) == TOYS
    assert "15 of 15 steps ran" in done.stdout
    commit(path, "ran")
    return path


@pytest.fixture
def checkout(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished checkout, with links and cache as they were."""
    path = tmp_path / "checkout"
    command(tmp_path, "cp", "-a", str(finished), str(path))
    return path


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def wait_for(condition: Callable[[], object], seconds: float) -> None:
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


def test_alternating_flow_and_dvc_is_never_wrong_and_never_recomputes(finished: Path, api: str, checkout: Path) -> None:
    first = outputs(checkout)

    # nothing changed: neither runs anything, and the flow says so
    dvc(checkout, "repro")
    done = flow(checkout, api)
    assert runs(checkout) == []
    assert "Nothing changed" in done.stdout
    run, states = last_flow_run(api)
    assert (run["state"]["message"], set(states.values())) == ("nothing changed", {"Cached"})
    assert sorted(states) == sorted(NAMES)

    # a new ratio by DVC, then the flow has nothing to do
    set_param(checkout, "pruning_ratio: 0.2 ", "pruning_ratio: 0.4 ")
    dvc(checkout, "repro")
    after_ratio = ["score_pool", "allocate", "prune", "recover", "evaluate", "benchmark", "report"]
    assert runs(checkout) == after_ratio
    second = outputs(checkout)
    assert second["artifacts/plan.json"] != first["artifacts/plan.json"]
    flow(checkout, api)
    assert runs(checkout) == []

    # restored by the flow: the same bytes as at first, out of the run-cache
    set_param(checkout, "pruning_ratio: 0.4 ", "pruning_ratio: 0.2 ")
    flow(checkout, api)
    assert runs(checkout) == []
    assert outputs(checkout) == first
    _, states = last_flow_run(api)
    assert {name for name, state in states.items() if state != "Cached"} == {"record"}

    # restored by DVC, with outputs deleted in between
    set_param(checkout, "pruning_ratio: 0.2 ", "pruning_ratio: 0.4 ")
    command(checkout, "rm", "-rf", "artifacts/checkpoint", "reports/evaluation.json", "data/model")
    dvc(checkout, "repro")
    assert runs(checkout) == []
    assert outputs(checkout) == second

    # deleted outputs come back by the flow; changing evaluation only reruns what judges
    command(checkout, "rm", "-rf", "artifacts", "data/candidates.safetensors")
    set_param(checkout, "cloze_items: 200", "cloze_items: 300")
    flow(checkout, api)
    assert runs(checkout) == ["evaluate_dense", "evaluate", "report"]
    assert outputs(checkout)["artifacts/plan.json"] == second["artifacts/plan.json"]
    assert runs(checkout) == []

    # three experiments, three MLflow runs, however often each was visited
    assert [status for status, _ in mlflow_runs(checkout)] == ["FINISHED"] * 3


def test_runtime_settings_change_nothing(checkout: Path) -> None:
    set_param(checkout, "workers: auto ", "workers: 2 ")
    done = dvc(checkout, "repro")
    assert runs(checkout) == []
    assert "up to date" in done.stdout


def test_a_failing_step_fails_the_flow_with_one_line(checkout: Path, api: str) -> None:
    set_param(checkout, "pruning_ratio: 0.2 ", "pruning_ratio: 0.3 ")
    done = flow(checkout, api, check=False, TOY_FAILS="allocate")
    cause = "toy: expected a good day, got a bad one; try tomorrow"
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [f"error: {cause}"]
    assert "Traceback" not in done.stderr
    run, states = last_flow_run(api)
    assert (run["state"]["type"], run["state"]["message"]) == ("FAILED", cause)
    assert (states["score_pool"], states["allocate"]) == ("Completed", "Failed")
    assert "prune" not in states
    assert mlflow_runs(checkout)[-1] == ("FAILED", "failed in allocate")
    with sqlite3.connect(checkout / "mlflow.db") as database:
        assert (cause,) in database.execute("SELECT value FROM tags WHERE key = 'nirvana.error'").fetchall()
    # the next run takes up where this one stopped
    runs(checkout)
    flow(checkout, api)
    assert runs(checkout) == ["allocate", "prune", "recover", "evaluate", "benchmark", "report"]


def test_a_killed_step_fails_the_flow_and_the_next_run_works(checkout: Path, api: str) -> None:
    set_param(checkout, "pruning_ratio: 0.2 ", "pruning_ratio: 0.35 ")
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.pipeline"],
        cwd=checkout,
        env=environment(PREFECT_API_URL=api, TOY_SLEEPS="allocate"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    asleep = checkout / ".cache/asleep"
    try:
        wait_for(lambda: asleep.exists() and asleep.read_text(), 60)
        os.kill(int(asleep.read_text()), signal.SIGKILL)
        told = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.wait(30)
    cause = "allocate was killed (signal 9), perhaps for lack of memory; run the same command again"
    assert process.returncode == 1
    assert [line for line in told.splitlines() if line.startswith("error: ")] == [f"error: {cause}"]
    run, states = last_flow_run(api)
    assert (run["state"]["type"], run["state"]["message"]) == ("FAILED", cause)
    assert states["allocate"] == "Failed"
    # what the step itself logged reached Prefect
    logs = ask(api, "logs", {"logs": {"flow_run_id": {"any_": [run["id"]]}}})
    assert "toy allocate works" in {log["message"] for log in logs}
    assert runs(checkout) == ["score_pool", "allocate"]
    flow(checkout, api)
    assert runs(checkout) == ["allocate", "prune", "recover", "evaluate", "benchmark", "report"]


def test_a_mistake_in_the_parameters_is_told_before_anything_runs(checkout: Path, api: str) -> None:
    set_param(checkout, "pruning_ratio: 0.2 ", "pruning_ratio: 1.2 ")
    done = flow(checkout, api, check=False)
    assert done.returncode == 1
    assert "error: params.yaml: allocation.pruning_ratio: expected a number in [0, 1), got 1.2" in done.stderr
    assert runs(checkout) == []


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
