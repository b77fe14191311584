"""Whoever computes the candidates, values are the same, a killed worker loses nothing, and none outlives the step."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import toy_workers

from nirvana.errors import InputError
from tasks.params import Runtime
from tasks.workers import runners
from tasks.workers.jobs import Job, Outcome, WorkerError, attempt
from tasks.workers.process_pool import run_in_processes
from tasks.workers.runners import slot_devices

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
PROCESSES = Runtime("cpu", "auto", "auto", "processes", 2, None)
DASK = replace(PROCESSES, runner="dask")


def make_jobs(folder, count=5, **arguments):
    (folder / "input").write_text("what workers read", encoding="utf-8")
    arguments = {"folder": str(folder), **arguments}
    return [Job(index, folder / f"{index}.txt", {"input": folder / "input"}, arguments) for index in range(count)]


def run(worker, jobs, runtime):
    """Return the values by index, in the order in which they came."""
    values, shares = {}, []
    try:
        runners.run(
            worker,
            jobs,
            runtime,
            runtime.workers,
            CPU,
            lambda job, value: values.update({job.index: value}),
            shares.append,
        )
    except Exception as error:
        error.values = values
        raise
    assert sum(shares) == len(jobs)
    return values


SQUARES = {index: str(index**2).encode() for index in range(5)}


def test_one_worker_is_this_process_and_goes_in_order(tmp_path):
    values = run(toy_workers.square, make_jobs(tmp_path), replace(PROCESSES, workers=1))
    assert list(values.items()) == list(SQUARES.items())
    with pytest.raises(LookupError) as caught:
        run(toy_workers.square, make_jobs(tmp_path, broken=2), replace(PROCESSES, workers=1))
    assert caught.value.values == {0: b"0", 1: b"1"}


@pytest.mark.parametrize(
    ("device", "slots", "gpus", "expected"),
    [
        ("cpu", 3, 0, ["cpu"] * 3),
        ("cpu", 2, 4, ["cpu"] * 2),
        ("cuda", 2, 1, ["cuda"] * 2),
        ("cuda", 5, 2, ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]),
        ("cuda", 2, 4, ["cuda:0", "cuda:1"]),
        ("cuda:1", 2, 4, ["cuda:1"] * 2),
    ],
)
def test_slots_are_spread_over_the_gpus(device, slots, gpus, expected):
    assert slot_devices(torch.device(device), slots, gpus) == expected


def test_dask_workers_are_spread_over_the_gpus_of_their_machine():
    from tasks.workers.dask_pool import worker_devices
    from tasks.workers.dask_worker import Place

    places = [Place("b", "one", 2, None), Place("c", "two", 1, None), Place("a", "one", 2, None)]
    assert worker_devices(torch.device("cuda"), places) == {"a": "cuda:0", "b": "cuda:1", "c": "cuda"}
    assert set(worker_devices(CPU, places).values()) == {"cpu"}


def test_errors_travel_as_text(tmp_path):
    job = make_jobs(tmp_path, wrong=0)[0]
    with pytest.raises(InputError, match=r"^expected a good candidate, got a bad one; stop$"):
        attempt(toy_workers.square, job, "cpu").unwrap()
    with pytest.raises(WorkerError, match=r"^LookupError: two\nlines") as caught:
        attempt(toy_workers.square, replace(job, arguments={"broken": 0}), "cpu").unwrap()
    assert "toy_workers.py" in caught.value.__notes__[0]
    with pytest.raises(MemoryError):
        Outcome(error="MemoryError").unwrap()
    assert attempt(toy_workers.square, make_jobs(tmp_path)[3], "cpu") == Outcome(b"9")


def test_a_process_tells_shares_of_its_job_and_those_lost_with_it_are_taken_back(tmp_path):
    values, shares = [], []
    jobs = make_jobs(tmp_path)[2:3]
    run_in_processes(toy_workers.killed_once, jobs, ["cpu"], 1, lambda job, value: values.append(value), shares.append)
    assert values == [b"4"]
    assert shares == [0.5, -0.5, 0.5, 0.5, 0]


@pytest.mark.slow
def test_processes_agree_and_compute_as_the_step_does(tmp_path):
    assert run(toy_workers.square, make_jobs(tmp_path), PROCESSES) == SQUARES
    setup = run(toy_workers.setup, make_jobs(tmp_path, 2), PROCESSES)
    assert set(setup.values()) == {f"cpu {torch.get_num_threads()} True :4096:8".encode()}
    assert not _workers_left()


def _workers_left():
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.slow
def test_error_in_a_process_ends_all_and_keeps_what_was_done(tmp_path):
    with pytest.raises(InputError, match="got a bad one") as caught:
        run(toy_workers.square, make_jobs(tmp_path, wrong=4), PROCESSES)
    # when job 4 is given out, one of the others may still be under way
    assert len(caught.value.values) >= 3
    assert not _workers_left()


@pytest.mark.slow
@pytest.mark.parametrize("runtime", [PROCESSES, DASK], ids=["processes", "dask"])
def test_killed_worker_loses_nothing(runtime, tmp_path):
    assert run(toy_workers.killed_once, make_jobs(tmp_path), runtime) == SQUARES
    assert len(list(tmp_path.glob("tried-2-*"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("runtime", [PROCESSES, DASK], ids=["processes", "dask"])
def test_job_that_kills_its_workers_is_given_up(runtime, tmp_path):
    with pytest.raises(InputError, match=r"^candidate 2: expected a value, got none: its .* killed") as caught:
        run(toy_workers.killed_always, make_jobs(tmp_path), runtime)
    assert "\n" not in str(caught.value)
    assert len(list(tmp_path.glob("tried-2-*"))) == 2
    assert caught.value.values.items() <= SQUARES.items()
    assert caught.value.values
    assert not _workers_left()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
@pytest.mark.parametrize("runner", ["processes", "dask"])
def test_no_worker_outlives_its_step(runner, how, tmp_path):
    # a shell that starts tests in the background has them ignore the keyboard
    code = f"""
import signal; signal.signal(signal.SIGINT, signal.default_int_handler)
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}, {str(ROOT / "tests/tasks")!r}]
import toy_workers
from pathlib import Path
from test_runners import DASK, PROCESSES, make_jobs, run
if __name__ == "__main__":
    run(toy_workers.sleep, make_jobs(Path("."), 2), {runner.upper()})
"""
    (tmp_path / "script.py").write_text(code)
    errors = (tmp_path / "stderr").open("w")
    step = subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path, stderr=errors, start_new_session=True)
    _until(lambda: len(list(tmp_path.glob("pid-*"))) == 2, 120)
    started = psutil.Process(step.pid).children(recursive=True)
    assert {int(file.read_text()) for file in tmp_path.glob("pid-*")} <= {child.pid for child in started}
    if how == signal.SIGINT:
        os.killpg(step.pid, how)  # as a terminal does: to the step and to its workers
    else:
        step.kill()
    assert step.wait(60) != 0
    _until(lambda: not any(child.is_running() for child in started), 10)


def _until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def dask_machine(tmp_path_factory):
    """A scheduler and two workers, started by hand as docs/team.md says; yields the runtime that names them."""
    address = f"tcp://127.0.0.1:{_free_port()}"
    with _dask("scheduler", "--host", address, "--no-dashboard"), _dask_worker(address), _dask_worker(address):
        yield replace(DASK, scheduler=address)


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _dask_worker(address, *options):
    return _dask("worker", address, "--host", "127.0.0.1", "--no-dashboard", *(options or ("--nthreads", "1")))


@contextmanager
def _dask(*arguments):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "dask", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait()


@pytest.mark.slow
def test_scheduler_of_others_gives_the_same_and_loses_nothing(dask_machine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # workers are elsewhere: they need whole paths
    jobs = make_jobs(tmp_path)
    jobs = [replace(job, files={"input": Path("input")}) for job in jobs]
    assert run(toy_workers.killed_once, jobs, dask_machine) == SQUARES
    with pytest.raises(InputError, match="got a bad one"):
        run(toy_workers.square, make_jobs(tmp_path, wrong=1), dask_machine)
    with pytest.raises(WorkerError, match="LookupError"):
        run(toy_workers.square, make_jobs(tmp_path, broken=1), dask_machine)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"code": "edited"}, "expected this checkout's code, got another version"),
        ({"libraries": {"torch": "1.0"}}, "expected torch 1.0, got "),
        ({"machine": "abacus"}, "expected a processor of kind abacus, got "),
        (
            {"files": {Path("/nowhere"): "digest"}},
            "expected /nowhere as this machine has it, found nothing",
        ),
        ({"files": {Path(__file__): "digest"}}, "as this machine has it, got other content; keep the checkout"),
    ],
)
def test_worker_that_differs_is_refused_before_any_job(change, expected, dask_machine, tmp_path, monkeypatch):
    from tasks.workers import dask_pool

    ours = dask_pool.likeness
    monkeypatch.setattr(dask_pool, "likeness", lambda *args: replace(ours(*args), **change))
    with pytest.raises(InputError) as caught:
        run(toy_workers.sleep, make_jobs(tmp_path), dask_machine)
    assert expected in str(caught.value)
    assert str(caught.value).startswith("Dask worker tcp://127.0.0.1:")
    assert not list(tmp_path.glob("pid-*"))


@pytest.mark.slow
def test_worker_that_joins_late_says_what_is_wrong_with_it(dask_machine, tmp_path):
    """Two threads in one process would share a model and torch's settings."""
    with (
        _dask_worker(dask_machine.scheduler, "--nthreads", "2"),
        pytest.raises(InputError, match="expected 1 thread, got 2; start it with --nthreads 1"),
    ):
        run(toy_workers.short, make_jobs(tmp_path, 120), dask_machine)  # 30 s: it has joined by then


@pytest.mark.slow
def test_scheduler_that_is_not_there_is_named(tmp_path, monkeypatch):
    from tasks.workers import dask_cluster

    assert dask_cluster.CONNECT_SECONDS <= 20
    monkeypatch.setattr(dask_cluster, "CONNECT_SECONDS", 3)
    address, start = f"tcp://127.0.0.1:{_free_port()}", time.monotonic()
    with pytest.raises(InputError, match=f"expected a Dask scheduler at {address}, got no answer"):
        run(toy_workers.square, make_jobs(tmp_path), replace(DASK, scheduler=address))
    assert time.monotonic() - start < 10


@pytest.mark.slow
def test_scheduler_without_workers_and_one_that_goes_away(tmp_path, monkeypatch):
    from tasks.workers import dask_pool

    address = f"tcp://127.0.0.1:{_free_port()}"
    runtime = replace(DASK, scheduler=address)
    with _dask("scheduler", "--host", address, "--no-dashboard") as scheduler:
        monkeypatch.setattr(dask_pool, "_WORKERS_SECONDS", 3)
        with pytest.raises(InputError, match=f"expected workers at {address}, got none that answers"):
            run(toy_workers.square, make_jobs(tmp_path), runtime)
        monkeypatch.setattr(dask_pool, "_WORKERS_SECONDS", 30)
        with _dask_worker(address):
            kill = scheduler.kill

            def finish(job, value):
                kill()

            with pytest.raises(InputError, match="expected the Dask scheduler to stay, lost it"):
                runners.run(toy_workers.short, make_jobs(tmp_path), runtime, 1, CPU, finish, lambda share: None)
