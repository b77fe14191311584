"""Fan-out: nothing is lost when a step is killed, nothing broken is used, and workers do not change a byte."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_ids, tiny_llama

from nirvana.errors import InputError
from nirvana.files import sha256_directory
from tasks import aggregate_saliency, candidates, collect_gradients, score_pool
from tasks.candidates import Job, candidate_key, run_jobs
from tasks.params import load_params, parse_params

ROOT = Path(__file__).parents[2]


def write_square(job, progress):
    """Worker: leave index² as text."""
    if job.arguments.get("fatal") == job.index:
        os.kill(os.getpid(), signal.SIGKILL)
    if job.arguments.get("wrong") == job.index:
        raise InputError("expected a good candidate, got a bad one; stop")
    job.result.write_text(str(job.index**2))
    progress(1)


def is_square(job):
    return job.result.exists() and job.result.read_text() == str(job.index**2)


def make_jobs(folder, count=4, **arguments):
    return [Job(index, folder / f"{index}.txt", arguments) for index in range(count)]


def test_valid_values_are_reused_and_broken_ones_are_not(tmp_path, caplog):
    jobs = make_jobs(tmp_path)
    jobs[1].result.write_text("1")
    jobs[2].result.write_text("half of a val")
    before = jobs[1].result.stat().st_mtime_ns
    with caplog.at_level("INFO"):
        run_jobs(write_square, jobs, is_square, 1, "test")
    assert all(is_square(job) for job in jobs)
    assert jobs[1].result.stat().st_mtime_ns == before
    assert "resuming, 1 of 4 candidates are already done" in caplog.text


def test_error_of_a_worker_arrives_and_keeps_what_was_done(tmp_path):
    jobs = make_jobs(tmp_path, wrong=2)
    with pytest.raises(InputError, match="got a bad one"):
        run_jobs(write_square, jobs, is_square, 1, "test")
    assert [job.index for job in jobs if is_square(job)] == [0, 1]


def test_key_depends_on_what_is_stated():
    assert candidate_key("a", x=1) == candidate_key("a", x=1)
    assert len({candidate_key("a", x=1), candidate_key("a", x=2), candidate_key("b", x=1)}) == 3


@pytest.fixture
def params():
    return load_params(ROOT / "params.yaml")


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """A tiny model, three candidates and a held-out batch, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    tiny_llama(tmp_path / "model")
    save_file({"input_ids": random_ids(12, 10).view(3, 4, 10)}, tmp_path / "candidates.safetensors")
    save_file({"input_ids": random_ids(3, 10, seed=9)}, tmp_path / "heldout.safetensors")
    names = ("model", "channel_saliency", "unit_saliency")
    paths = {name: tmp_path / name for name in names}
    paths |= {name: tmp_path / f"{name}.safetensors" for name in ("candidates", "heldout")}
    return paths | {"kl_scores": tmp_path / "kl.csv", "selection": tmp_path / "selection.json"}


def with_runtime(params, **changes):
    from dataclasses import asdict

    values = asdict(params)
    values["runtime"] |= changes
    return parse_params(values)


def test_cache_is_emptied_when_the_step_is_done(params, pool):
    collect_gradients.run(params, pool, pool)
    assert sorted(f.name for f in pool["channel_saliency"].iterdir()) == [
        f"candidate_{index:03d}.safetensors" for index in range(3)
    ]
    assert list(candidates.CACHE.iterdir()) == []


@pytest.mark.parametrize(
    ("step", "name", "output"),
    [(collect_gradients, "channel_saliency", "channel_saliency"), (score_pool, "kl_divergence", "selection")],
)
def test_killed_step_resumes_at_its_candidates(step, name, output, params, pool, monkeypatch):
    """Two of three candidates are done when the step dies; the next run computes one."""
    collect_gradients.run(params, pool, pool)
    aggregate_saliency.run(params, pool, pool)
    step.run(params, pool, pool)
    undisturbed = content(pool[output])
    remove(pool[output])
    calls = []
    real = getattr(step, name)

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(step, name, counted)
    with pytest.raises(KeyboardInterrupt):
        step.run(params, pool, pool)
    assert not pool[output].exists()
    step.run(params, pool, pool)
    assert len(calls) == 4
    assert content(pool[output]) == undisturbed


def content(path):
    return sha256_directory(path) if path.is_dir() else path.read_bytes()


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_not_finite_cache_is_not_used(params, pool):
    collect_gradients.run(params, pool, pool)
    good = sha256_directory(pool["channel_saliency"])
    file = pool["channel_saliency"] / "candidate_000.safetensors"
    vectors = load_file(file)
    expected = {name: len(vector) for name, vector in vectors.items()}
    assert collect_gradients._is_valid(file, expected)
    key = next(iter(vectors))
    for damage in (lambda v: v[key].fill_(torch.nan), lambda v: v.pop(key)):
        damaged = {name: vector.clone() for name, vector in vectors.items()}
        damage(damaged)
        save_file(damaged, pool["model"].parent / "damaged.safetensors")
        assert not collect_gradients._is_valid(pool["model"].parent / "damaged.safetensors", expected)
    assert sha256_directory(pool["channel_saliency"]) == good


@pytest.mark.slow
def test_workers_change_no_byte(params, pool, tmp_path):
    digests = []
    for workers in (1, 2):
        many = with_runtime(params, workers=workers)
        collect_gradients.run(many, pool, pool)
        aggregate_saliency.run(many, pool, pool)
        score_pool.run(many, pool, pool)
        digests.append(
            (sha256_directory(pool["channel_saliency"]), pool["kl_scores"].read_bytes(), pool["selection"].read_bytes())
        )
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_killed_worker_is_explained_and_loses_nothing(tmp_path):
    """In a process of its own: workers are spawned and must be able to import the worker."""
    code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests/tasks")!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from test_candidates import make_jobs, write_square, is_square, run_jobs, InputError
if __name__ == "__main__":
    try:
        run_jobs(write_square, make_jobs(Path({str(tmp_path)!r}), 6, fatal=5), is_square, 2, "test")
    except InputError as error:
        print(error)
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert "a worker process was killed" in done.stdout, done.stderr
    assert (tmp_path / "0.txt").exists()


@pytest.mark.slow
def test_workers_die_with_their_step(tmp_path):
    """kill -9 on the step: its workers must not go on and write."""
    code = f"""
import sys, time, os; sys.path[:0] = [{str(ROOT)!r}]
from pathlib import Path
from tasks.candidates import Job, run_jobs
def slow(job, progress):
    Path("pid-%d" % job.index).write_text(str(os.getpid()))
    time.sleep(60)
if __name__ == "__main__":
    run_jobs(slow, [Job(i, Path(f"{{i}}.txt"), {{}}) for i in range(2)], lambda job: False, 2, "test")
"""
    (tmp_path / "script.py").write_text(code)
    step = subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while len(list(tmp_path.glob("pid-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    pids = [int(f.read_text()) for f in tmp_path.glob("pid-*")]
    assert len(pids) == 2
    step.kill()
    step.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
