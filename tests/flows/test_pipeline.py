"""The flow and DVC drive the same steps: never a wrong result, never a recomputation, never a writer left behind.

Real Prefect, DVC, MLflow and git in a checkout of toy steps.
"""

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from toy import command, dvc, environment, runs, set_param
from toy_flows import ask, flow, last_flow_run, mlflow_runs, outputs, wait_for

from tasks.registry import STEPS

pytestmark = pytest.mark.slow
NAMES = [step.name for step in STEPS]


def test_alternating_flow_and_dvc_is_never_wrong_and_never_recomputes(api: str, checkout: Path) -> None:
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
