"""A step's process: one line for a mistake, quiet, cheap, and gone when its driver is."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy import command, environment, runs, set_param, toy_checkout

from tasks.registry import STEPS
from tasks.workers.process import disk_full_line


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy checkout in which the steps before sample_pool have run."""
    path = toy_checkout(tmp_path_factory.mktemp("checkout"))
    before = ["fetch_model", "fetch_corpus"]
    for name in before:
        command(path, sys.executable, "-m", "tasks", name)
    assert runs(path) == before
    return path


def run_step(path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return command(path, sys.executable, "-m", "tasks", *arguments, check=False, **variables)


def test_a_step_runs_by_hand_and_leaves_its_record_and_log(fetched: Path) -> None:
    assert run_step(fetched, "sample_pool").returncode == 0
    assert runs(fetched) == ["sample_pool"]
    record = json.loads((fetched / ".cache/steps/sample_pool.json").read_text())
    assert record["outcome"] == "completed"
    assert record["peak_rss_bytes"] > 1e6
    assert 0 < record["seconds"] < 60
    assert "INFO toy sample_pool works" in (fetched / ".cache/steps/sample_pool.log").read_text()
    first = record["token"]
    run_step(fetched, "sample_pool")
    runs(fetched)
    assert json.loads((fetched / ".cache/steps/sample_pool.json").read_text())["token"] != first


def test_bad_input_is_one_line_and_status_two(fetched: Path) -> None:
    done = run_step(fetched, "fetch_model", TOY_FAILS="fetch_model")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if not line.startswith("I ")]
    assert errors == ["error: toy: expected a good day, got a bad one; try tomorrow"]
    assert json.loads((fetched / ".cache/steps/fetch_model.json").read_text())["outcome"] == "failed"
    runs(fetched)


def test_an_unexpected_error_keeps_its_traceback_in_the_log(fetched: Path) -> None:
    module = fetched / "tasks/fetch_corpus.py"
    text = module.read_text()
    module.write_text(text + "\ndef run(params, inputs, outputs):\n    1 / 0\n")
    done = run_step(fetched, "fetch_corpus")
    module.write_text(text)
    assert done.returncode == 1
    expected = "error: fetch_corpus failed unexpectedly with ZeroDivisionError: division by zero; .cache/steps/"
    assert done.stderr.splitlines()[-1].startswith(expected)
    assert "Traceback" in (fetched / ".cache/steps/fetch_corpus.log").read_text()


def test_a_missing_input_names_the_way_to_it(fetched: Path) -> None:
    done = run_step(fetched, "prune")
    assert done.returncode == 2
    assert (
        "error: prune: expected artifacts/plan.json, found nothing; run `dvc repro prune` to make it first"
        in done.stderr
    )


def test_a_mistake_in_params_stops_any_step(fetched: Path) -> None:
    set_param(fetched, "gamma: null ", "gama: null ")
    done = run_step(fetched, "fetch_model")
    set_param(fetched, "gama: null ", "gamma: null ")
    assert done.returncode == 2
    assert done.stderr.startswith("error: params.yaml: allocation.gama: unknown key")
    assert runs(fetched) == []


def test_reading_an_undeclared_parameter_fails(fetched: Path) -> None:
    module = fetched / "tasks/fetch_corpus.py"
    text = module.read_text()
    module.write_text(text.replace("params.corpus", "params.allocation"))
    done = run_step(fetched, "fetch_corpus")
    module.write_text(text)
    assert done.returncode == 1
    assert "fetch_corpus reads `allocation`, which it does not declare" in done.stderr


def test_a_full_disk_is_one_line_with_what_is_free(fetched: Path) -> None:
    done = run_step(fetched, "fetch_model", TOY_FILLS_DISK="fetch_model")
    assert done.returncode == 2
    assert "error: disk full during fetch_model writing artifacts/x:" in done.stderr
    assert "free, up to" in done.stderr
    runs(fetched)


def test_a_full_disk_is_recognised_in_other_libraries_words(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"x" * 3_000_000)
    words = 'Error while serializing: I/O error: Os { code: 28, message: "No space left on device" }'
    line = disk_full_line(RuntimeError(words), "prune", [tmp_path / "model"])
    assert line is not None
    assert "up to 3.0 MB needed" in line
    assert disk_full_line(RuntimeError("anything else"), "prune", []) is None
    assert disk_full_line(OSError(2, "No such file"), "prune", []) is None


def test_a_file_size_limit_is_told_like_a_full_disk(fetched: Path) -> None:
    """The kernel's own limit: a write beyond it fails as on a full disk, and nothing half-written stays."""
    module = fetched / "tasks/fetch_model.py"
    text = module.read_text()
    module.write_text(
        "from nirvana.files import atomic_directory\n"
        "def run(params, inputs, outputs):\n"
        "    with atomic_directory(outputs['model']) as d:\n"
        "        (d / 'model.safetensors').write_bytes(b'x' * 4_000_000)\n"
    )
    command(fetched, "rm", "-rf", "data/model")
    done = command(fetched, "bash", "-c", f"ulimit -f 1000; exec {sys.executable} -m tasks fetch_model", check=False)
    module.write_text(text)
    assert done.returncode == 2, done.stderr
    assert "error: disk full during fetch_model" in done.stderr
    assert [file.name for file in (fetched / "data").glob("*model*")] == []
    command(fetched, sys.executable, "-m", "tasks", "fetch_model")
    runs(fetched)


def test_threads_and_switches_are_set_before_the_step_is_imported(fetched: Path) -> None:
    shown = "os.environ['OMP_NUM_THREADS'], os.environ.get('HF_HUB_OFFLINE', '-')"
    report = f"import os, sys\nsys.stderr.write('|'.join([{shown}]) + '\\n')\n"
    seen = {}
    for name in ("sample_pool", "fetch_model"):
        module = fetched / f"tasks/{name}.py"
        text = module.read_text()
        module.write_text(report + text)
        seen[name] = run_step(fetched, name, OMP_NUM_THREADS="7").stderr.splitlines()[0]
        module.write_text(text)
    # neither declares compute.threads (2): one thread; only a fetch step may reach the network
    assert seen == {"sample_pool": "1|1", "fetch_model": "1|-"}
    runs(fetched)


def test_the_command_line_lists_steps_and_corrects_names(fetched: Path) -> None:
    assert run_step(fetched, "--list").stdout.split() == [step.name for step in STEPS]
    done = run_step(fetched, "prun")
    assert (done.returncode, done.stderr) == (2, "error: expected one step's name, got 'prun'; did you mean prune?\n")
    assert run_step(fetched).returncode == 2


def test_the_wrong_interpreter_is_told_kindly(fetched: Path) -> None:
    done = command(fetched, sys.executable, "-S", "-m", "tasks", "prune", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {sys.executable}")
    assert "activate" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_listing_the_steps_is_cheap() -> None:
    script = (
        "import sys; from tasks.__main__ import main; main(['--list']);"
        "print('torch' in sys.modules, 'mlflow' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


@pytest.mark.skipif(sys.platform != "linux", reason="PDEATHSIG is Linux's")
def test_a_step_dies_with_the_process_that_drives_it(fetched: Path) -> None:
    driver = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import subprocess; subprocess.run(['{sys.executable}', '-m', 'tasks', 'fetch_model'])",
        ],
        cwd=fetched,
        env=environment(DVC_STAGE="fetch_model", TOY_SLEEPS="fetch_model"),
    )
    asleep = fetched / ".cache/asleep"
    deadline = time.monotonic() + 30
    while not (asleep.exists() and asleep.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    step = int(asleep.read_text())
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    deadline = time.monotonic() + 3
    while Path(f"/proc/{step}/stat").exists() and Path(f"/proc/{step}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the step outlived its driver"
        time.sleep(0.05)
    asleep.unlink()
    runs(fetched)


def test_a_step_whose_driver_is_already_gone_does_not_start(fetched: Path) -> None:
    done = run_step(fetched, "fetch_model", DVC_STAGE="fetch_model", NIRVANA_DRIVER_PID=str(os.getpid() + 1))
    assert done.returncode != 0
    assert runs(fetched) == []
