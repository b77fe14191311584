"""Short versions of `make kills` and `make damage`: real steps, killed and damaged, byte for byte."""

import random
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
from toy import command

from benchmarks.reliability import compare, damage, kills
from benchmarks.reliability.checkout import prepare
from benchmarks.reliability.results import Results, chosen
from tasks.registry import STEPS


@pytest.mark.slow
def test_a_killed_step_ends_with_the_same_bytes(tmp_path):
    run = prepare(tmp_path, ["sample_pool", "collect_gradients"])
    for number, (step, victim) in enumerate([("sample_pool", "driver"), ("collect_gradients", "all")]):
        where, outcome = kills.kill_once(run, kills.Kill(number, step, victim, prefect=False), seed=1)
        assert outcome == "equal", (step, where)


@pytest.mark.slow
def test_what_is_damaged_is_made_again_or_refused(finished_real, tmp_path):
    command(tmp_path, "cp", "-a", str(finished_real.parent), "real")  # with the model and the corpus
    finished = tmp_path / "real/checkout"
    cases = [case for case in damage.cases() if case.name in CASES]
    assert len(cases) == len(CASES)
    for tried in damage.together(cases, 4):
        for name, outcome in damage.try_cases(tried, finished, finished, tmp_path / "real/damaged").items():
            assert not outcome.startswith("WRONG"), f"{name}: {outcome}"


CASES = {
    "flip artifacts/checkpoint/model.safetensors",
    "flip reports/evaluation.json",
    "flip the cache's artifacts/checkpoint/model.safetensors",
    "flip dvc.lock (1)",
    "flip a metric in mlflow.db",
    "cut DVC's database of hashes",
}


def test_the_plan_has_every_step_and_every_victim():
    planned = kills.planned(30)
    assert [kill.step for kill in planned] == [step.name for step in STEPS] * 2
    assert {kill.victim for kill in planned[:15]} == {"all"} and not any(kill.prefect for kill in planned[:15])
    shown = [kill for kill in planned[15:] if kill.prefect]
    assert len(shown) == 8 and {kill.victim for kill in shown} == {"all", "driver", "step"}
    assert len({kill.name for kill in planned}) == 30


def test_at_least_sixty_damages_of_different_names():
    cases = list(damage.cases())
    assert len({case.name for case in cases}) == len(cases) >= 60
    groups = list(damage.together(cases, 4))
    assert [case for group in groups for case in group] == cases
    assert max(map(len, groups)) == 4
    for group in groups:
        assert len(group) == 1 or not any(case.alone for case in group)


def test_the_judge_can_tell(tmp_path):
    """A result that differs, or an error of many lines, is not let pass."""
    for name in ("finished", "damaged"):
        (tmp_path / name / "artifacts").mkdir(parents=True)
        (tmp_path / name / "artifacts/plan.json").write_text(name)
    finished, damaged = tmp_path / "finished", tmp_path / "damaged"
    assert damage.judge(finished, damaged, 0, "") == "WRONG: artifacts/plan.json differ"
    assert damage.judge(finished, finished, 1, "error: a: b; c\n") == "refused: error: a: b; c"
    assert damage.judge(finished, finished, 1, "Traceback ...\nerror: a\n").startswith("WRONG")
    assert damage.judge(finished, finished, 0, "") == "made again (DVC asked again)"
    assert damage.judge(finished, finished, 0, "WARNING plan.json: x") == "made again (named: WARNING plan.json: x)"
    cached = finished / ".dvc/cache/files/md5/ab/cd"
    cached.parent.mkdir(parents=True)
    cached.write_text("what is not its name")
    assert damage.judge(finished, finished, 0, "").startswith("WRONG: .dvc/cache")


def test_of_damages_that_share_a_run_each_has_to_be_named():
    said = "WARNING data/a was changed since x wrote it; made again\n"
    assert damage._named("data/a", "made again (named: ...)", said).startswith("made again (named: WARNING data/a")
    assert damage._named("data/b", "made again (named: ...)", said).startswith("WRONG: data/b")
    assert damage._named("data/a", "refused: error: x", said).startswith("WRONG")


def checkout(path):
    """A finished checkout as far as the comparison looks: one step's output, dvc.lock, a leftover if any."""
    (path / "data/model").mkdir(parents=True)
    (path / "data/model/config.json").write_text("{}")
    (path / "dvc.lock").write_text("stages:\n  fetch_model:\n    outs: [{path: data/model, md5: a}]\n")
    return path


def test_the_comparison_can_tell(tmp_path):
    finished, same, other = (checkout(tmp_path / name) for name in ("finished", "same", "other"))
    assert compare.differing(finished, same, "fetch_model") == []
    (other / "data/model/config.json").write_text("{ }")
    (other / "data/.model.123.tmp").write_text("half")
    (other / "dvc.lock").write_text("stages:\n  fetch_model:\n    outs: [{path: data/model, md5: b}]\n")
    wrong = ["data/model/config.json", "dvc.lock", "data/.model.123.tmp is left over"]
    assert compare.differing(finished, other, "fetch_model") == wrong
    (same / "dvc.lock").unlink()
    assert compare.differing(finished, same, "fetch_model") == ["dvc.lock"]


def test_the_comparison_of_runs_leaves_out_what_is_measured_only(tmp_path):
    def store(name, perplexity, latency):
        (tmp_path / name).mkdir()
        with closing(sqlite3.connect(tmp_path / name / "mlflow.db")) as database:
            database.executescript(
                "CREATE TABLE runs (run_uuid, status, lifecycle_stage); CREATE TABLE tags (run_uuid, key, value);"
                "CREATE TABLE params (run_uuid, key, value); CREATE TABLE latest_metrics (run_uuid, key, value);"
                "INSERT INTO runs VALUES ('r', 'FINISHED', 'active');"
                "INSERT INTO tags VALUES ('r', 'nirvana.experiment_digest', 'd');"
                f"INSERT INTO latest_metrics VALUES ('r', 'benchmark.latency', {latency}), ('r', 'ppl', {perplexity});"
            )
        return tmp_path / name

    first, again, other = store("first", 9.5, 1.0), store("again", 9.5, 2.0), store("other", 9.6, 1.0)
    assert compare._wrong_runs(first, again) == []
    assert compare._wrong_runs(first, other) == ["the MLflow run (1 of 1 are this experiment's)"]


def test_a_stopped_run_goes_on(tmp_path, capsys):
    results = Results(tmp_path / "lines.jsonl")
    results.add("a", True, "equal")
    results.add("b", False, "differs")
    again = Results(tmp_path / "lines.jsonl")
    assert again.is_known("a") and again.is_known("b") and not again.is_known("c")
    assert again.close(["a", "b", "c"]) == 1
    assert "NOT PASSED: b: differs\n1 of 3;" in capsys.readouterr().out
    again._last["b"]["code"] = "of before the mending"
    assert not again.is_known("b") and again.is_known("a")
    assert not Results(tmp_path / "lines.jsonl", afresh=True).is_known("a")
    assert chosen(["a 1", "b 1", "b 2"], "1", "b") == ["b 1"]


def test_a_process_that_goes_on_after_its_driver_is_named(tmp_path, monkeypatch):
    """A driver that nothing kills with its parent: what it started stays, is named, and is ended."""
    monkeypatch.setattr(kills, "_ALONE_SECONDS", 0.5)
    code = "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    command = [sys.executable, "-c", code + "print(flush=True)\ntime.sleep(60)"]
    driver = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, start_new_session=True)
    driver.stdout.readline()
    assert kills.hit(driver, tmp_path, "driver")
    assert "time.sleep(60)" in (kills.left_running(driver, tmp_path, "driver") or "")
    assert driver.returncode == -signal.SIGKILL
    assert kills.left_running(driver, tmp_path, "driver") is None
    assert not kills.hit(driver, tmp_path, "all")
    driver.stdout.close()


def test_damages_are_the_same_each_time(tmp_path):
    contents = []
    for name in ("a", "b"):
        file = tmp_path / name
        file.write_bytes(bytes(1000))
        damage.flip(file, random.Random("0 x"))
        contents.append(file.read_bytes())
    assert contents[0] == contents[1] != bytes(1000)
