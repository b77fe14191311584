"""Fan-out: nothing is lost when a step is killed, nothing broken is used, and workers do not change a byte."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_ids, tiny_llama
from toy_workers import square

from nirvana.errors import InputError
from nirvana.files import read_sealed, sha256_directory, write_sealed
from tasks import aggregate_saliency, collect_gradients, score_pool
from tasks.params import Runtime, load_params, parse_params
from tasks.workers import candidates
from tasks.workers.candidates import candidate_key, run_jobs
from tasks.workers.jobs import Job

ROOT = Path(__file__).parents[2]


def is_square(value):
    return value.isdigit() and int(value) in (0, 1, 4, 9)


def is_done(job):
    return read_sealed(job.result) == str(job.index**2).encode()


def make_jobs(folder, count=4, **arguments):
    return [Job(index, folder / f"{index}.txt", {}, arguments) for index in range(count)]


HERE = Runtime("cpu", "auto", "auto", "processes", 1, None)
CPU = torch.device("cpu")


def test_valid_values_are_reused_and_broken_ones_are_not(tmp_path, caplog):
    jobs = make_jobs(tmp_path)
    write_sealed(jobs[1].result, b"1")
    write_sealed(jobs[2].result, b"half of a val")
    jobs[3].result.write_text("9")  # no digest
    before = jobs[1].result.stat().st_mtime_ns
    with caplog.at_level("INFO"):
        run_jobs(square, jobs, is_square, HERE, 1, CPU, "test")
    assert all(is_done(job) for job in jobs)
    assert jobs[1].result.stat().st_mtime_ns == before
    assert "resuming, 1 of 4 candidates are already done" in caplog.text


def test_error_of_a_worker_arrives_and_keeps_what_was_done(tmp_path):
    jobs = make_jobs(tmp_path, wrong=2)
    with pytest.raises(InputError, match="got a bad one"):
        run_jobs(square, jobs, is_square, HERE, 1, CPU, "test")
    assert [job.index for job in jobs if is_done(job)] == [0, 1]


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


@pytest.mark.parametrize(
    ("step", "name", "output"),
    [(collect_gradients, "channel_saliency", "channel_saliency"), (score_pool, "kl_divergence", "selection")],
)
def test_a_flipped_bit_of_a_finished_candidate_is_not_believed(step, name, output, params, pool, monkeypatch, caplog):
    """One of three candidates is done when the step dies, and its value is another, plausible one when it resumes."""
    collect_gradients.run(params, pool, pool)
    aggregate_saliency.run(params, pool, pool)
    step.run(params, pool, pool)
    undisturbed = content(pool[output])
    remove(pool[output])
    calls = []
    real = getattr(step, name)

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(step, name, counted)
    with pytest.raises(KeyboardInterrupt):
        step.run(params, pool, pool)
    (kept,) = candidates.CACHE.iterdir()
    flipped = bytearray(kept.read_bytes())
    flipped[-3] ^= 1  # a digit, or the low bits of a float
    kept.write_bytes(flipped)
    step.run(params, pool, pool)
    assert "is damaged; candidate 0 is computed again" in caplog.text
    assert len(calls) == 2 + 3 and content(pool[output]) == undisturbed


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
    assert collect_gradients._is_valid(file.read_bytes(), expected)
    key = next(iter(vectors))
    for damage in (lambda v: v[key].fill_(torch.nan), lambda v: v.pop(key)):
        damaged = {name: vector.clone() for name, vector in vectors.items()}
        damage(damaged)
        save_file(damaged, pool["model"].parent / "damaged.safetensors")
        damaged_file = pool["model"].parent / "damaged.safetensors"
        assert not collect_gradients._is_valid(damaged_file.read_bytes(), expected)
    assert sha256_directory(pool["channel_saliency"]) == good


@pytest.mark.slow
def test_no_runner_changes_a_byte(params, pool):
    digests = []
    for runner, workers in (("processes", 1), ("processes", 2), ("dask", 2)):
        runtime = with_runtime(params, runner=runner, workers=workers)
        collect_gradients.run(runtime, pool, pool)
        aggregate_saliency.run(runtime, pool, pool)
        score_pool.run(runtime, pool, pool)
        digests.append(
            (sha256_directory(pool["channel_saliency"]), pool["kl_scores"].read_bytes(), pool["selection"].read_bytes())
        )
    assert digests[0] == digests[1] == digests[2]


def test_gpu_index_is_not_part_of_a_key(params, pool, monkeypatch):
    """A candidate that one GPU finished is not computed again on another."""
    results = []
    for device in ("cpu", "cpu:0"):
        monkeypatch.setattr(collect_gradients, "resolve_device", lambda name, device=device: torch.device(device))
        monkeypatch.setattr(collect_gradients, "run_jobs", lambda worker, jobs, *rest: results.append(jobs) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            collect_gradients.run(params, pool, pool)
    assert [job.result for job in results[0]] == [job.result for job in results[1]]
    assert results[0] == results[1]  # nor does a job name a device: its worker does
