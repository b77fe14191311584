"""The real steps, on a tiny model, under real DVC: same bytes everywhere, and only what a change asks for runs."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy import command, dvc, environment

from benchmarks.reliability.checkout import make_checkout, small_params
from tasks.registry import STEPS

pytestmark = pytest.mark.slow
NAMES = [step.name for step in STEPS]


def write_params(path: Path, **changes: dict[str, object]) -> None:
    """Write params.yaml (JSON is YAML) with the sizes of `finished_real`, then `changes`."""
    (path / "params.yaml").write_text(json.dumps(small_params(**changes), indent=1))


@pytest.fixture(scope="module")
def finished(finished_real, tmp_path_factory):
    """A checkout in which everything ran once; the model and the corpus lie beside it."""
    parent = tmp_path_factory.mktemp("copy") / "real"
    command(parent.parent, "cp", "-a", str(finished_real.parent), str(parent))
    return parent / finished_real.name


def tokens(path: Path) -> dict[str, str]:
    """Return every step's start token: a new one means that the step's code ran."""
    files = [path / ".cache/steps" / f"{name}.json" for name in NAMES]
    return {file.stem: json.loads(file.read_text())["token"] for file in files if file.exists()}


def ran(path: Path, *arguments: str) -> list[str]:
    """Run `dvc repro` and return the steps whose code ran."""
    before = tokens(path)
    dvc(path, "repro", *arguments)
    return [name for name, token in tokens(path).items() if before.get(name) != token]


def test_everything_ran_and_is_there(finished):
    plan = json.loads((finished / "artifacts/plan.json").read_text())
    total = sum(site["units"] * site["weights_per_unit"] for site in plan["sites"])
    assert abs(plan["achieved_ratio"]["total"] - 0.3) * total <= 8 * 3 * 32
    evaluation = json.loads((finished / "reports/evaluation.json").read_text())
    assert evaluation["tasks"]["cloze"]["items"] == 5
    assert (finished / "reports/report.html").stat().st_size > 10_000
    assert json.loads((finished / "reports/mlflow_run.json").read_text())["run_id"]
    assert list((finished / ".cache/candidates").iterdir()) == []
    metrics = dvc(finished, "metrics", "show").stdout
    assert "kl_divergence" in metrics and "achieved_ratio.total" in metrics


def test_two_clones_and_any_number_of_workers_give_the_same_bytes(finished, tmp_path):
    other = make_checkout(tmp_path)
    write_params(other, runtime={"workers": 2})
    dvc(other, "repro", "prune")
    for name in ("artifacts/plan.json", "reports/kl_scores.csv"):
        assert (other / name).read_bytes() == (finished / name).read_bytes()
    for name in ("artifacts/checkpoint", "artifacts/channel_saliency", "artifacts/unit_saliency"):
        for file in sorted((finished / name).iterdir()):
            assert (other / name / file.name).read_bytes() == file.read_bytes(), file.name


def test_only_what_a_change_asks_for_runs(finished):
    assert ran(finished) == []
    write_params(finished, evaluation={"cloze_items": 4})
    assert ran(finished) == ["evaluate_dense", "evaluate", "report", "record"]
    write_params(finished, evaluation={"cloze_items": 4}, runtime={"workers": 2, "device": "cpu"})
    assert ran(finished) == []
    write_params(finished, evaluation={"cloze_items": 4}, allocation={"pruning_ratio": 0.2})
    steps = ran(finished)
    assert "collect_gradients" not in steps and "aggregate_saliency" not in steps and "evaluate_dense" not in steps
    assert {"score_pool", "allocate", "prune", "recover", "evaluate", "benchmark", "report", "record"} == set(steps)
    plan = (finished / "artifacts/plan.json").read_bytes()
    write_params(finished)
    assert "prune" not in ran(finished)  # restored
    assert (finished / "artifacts/plan.json").read_bytes() != plan


@pytest.mark.parametrize(
    ("changes", "step", "message"),
    [
        ({"allocation": {"pruning_ratio": 0.99}}, "score_pool", "cannot be reached"),
        ({"allocation": {"round_to": 1000}}, "score_pool", "round_to: expected 1 to 96"),
        ({"calibration": {"pool_size": 500}}, "sample_pool", "pool"),
        ({"evaluation": {"cloze_items": 100000}}, "evaluate", "cloze"),
        ({"allocation": {"gamma": 0}}, "allocate", "gamma"),
        ({"allocation": {"pruning_ratio": 1.0}}, "allocate", "pruning_ratio"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_half_written(finished, changes, step, message):
    write_params(finished, **changes)
    try:
        done = command(finished, sys.executable, "-m", "tasks", step, check=False)
    finally:
        write_params(finished)
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and message in line
    assert not list(finished.rglob("*.tmp"))


# Faults on disk. Each breaks a copy of the finished checkout: a new file in place of the old one, as DVC's are links.


def replace(file: Path, content: bytes) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def change_json(file: Path, **changes: object) -> None:
    replace(file, json.dumps(json.loads(file.read_text()) | changes).encode())


def truncate(file: Path) -> None:
    replace(file, file.read_bytes()[:-100])


def broken_source(checkout: Path) -> Path:
    """Make a copy of the source model the checkout's source, and return it."""
    shutil.copytree(checkout.parent / "model", checkout / "source")
    write_params(checkout, model={"source": "path:source"})
    return checkout / "source"


def of_another_family(checkout: Path) -> None:
    change_json(broken_source(checkout) / "config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"])


def source_is_cut_off(checkout: Path) -> None:
    truncate(broken_source(checkout) / "model.safetensors")


def vocabulary_does_not_fit(checkout: Path) -> None:
    change_json(broken_source(checkout) / "config.json", vocab_size=100)


def model_is_cut_off(checkout: Path) -> None:
    truncate(checkout / "data/model/model.safetensors")


def weights_are_missing(checkout: Path) -> None:
    (checkout / "data/model/model.safetensors").unlink()


def weight_is_nan(checkout: Path) -> None:
    from safetensors.torch import load, save

    file = checkout / "data/model/model.safetensors"
    tensors = load(file.read_bytes())
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    replace(file, save(tensors, {"format": "pt"}))


def plan_is_of_another_model(checkout: Path) -> None:
    plan = json.loads((checkout / "artifacts/plan.json").read_text())
    change_json(checkout / "artifacts/plan.json", model=plan["model"] | {"digest": "sha256:" + "0" * 64})


def nothing(checkout: Path) -> None:
    """The disk is what fails."""


@pytest.fixture
def broken(finished):
    path = finished.parent / "broken"
    # without dvc.lock, which would tell of the fault before the step's own checks do
    shutil.copytree(finished, path, ignore=shutil.ignore_patterns(".git", ".dvc", "dvc.lock"))
    yield path
    shutil.rmtree(path)


def results(path: Path) -> dict[str, bytes]:
    """Return every file below the folders that steps write to, with its content."""
    files = [file for folder in ("data", "artifacts", "reports") for file in (path / folder).rglob("*")]
    return {str(file.relative_to(path)): file.read_bytes() for file in files if file.is_file()}


@pytest.mark.parametrize(
    ("break_it", "step", "message", "largest_kib"),
    [
        (of_another_family, "fetch_model", "unsupported architecture 'gpt2': expected one of gemma3_text", "unlimited"),
        (source_is_cut_off, "fetch_model", "path:source/model.safetensors: expected", "unlimited"),
        (vocabulary_does_not_fit, "fetch_model", "model.embed_tokens.weight: expected shape (100, 32)", "unlimited"),
        (model_is_cut_off, "collect_gradients", "data/model/model.safetensors", "unlimited"),
        (weights_are_missing, "collect_gradients", "model.safetensors", "unlimited"),
        (weight_is_nan, "collect_gradients", "finite", "unlimited"),
        (plan_is_of_another_model, "prune", "plan: expected the model sha256:0000", "unlimited"),
        (nothing, "prune", "the disk became full", "16"),
    ],
)
def test_a_fault_is_one_line_and_leaves_results_alone(broken, break_it, step, message, largest_kib):
    break_it(broken)
    before = results(broken)
    limited = f'ulimit -f {largest_kib}; exec "$0" -m tasks {step}'
    # a file cut off at the limit must not be bytecode
    done = command(broken, "bash", "-c", limited, sys.executable, check=False, PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], done.stderr
    assert "Traceback" not in done.stderr
    assert results(broken) == before
    assert not list(broken.rglob("*.tmp"))


def test_killed_step_resumes_and_no_orphan_writes(tmp_path):
    path = make_checkout(tmp_path)
    # enough work after the first candidate that the signal always comes in time
    candidates = 20
    write_params(path, calibration={"pool_size": candidates, "sequences": 8, "sequence_length": 96})
    dvc(path, "repro", "sample_pool")
    driver = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "collect_gradients"],
        cwd=path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    cache = path / ".cache/candidates"
    deadline = time.monotonic() + 120
    while not list(cache.glob("*.safetensors")) and time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.01)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    time.sleep(1)
    done_before = {file.name: file.stat().st_mtime_ns for file in cache.glob("*.safetensors")}
    time.sleep(2)
    assert {file.name: file.stat().st_mtime_ns for file in cache.glob("*.safetensors")} == done_before
    assert 0 < len(done_before) < candidates and not (path / "artifacts/channel_saliency").exists()
    dvc(path, "repro", "collect_gradients")
    log = (path / ".cache/steps/collect_gradients.log").read_text()
    assert f"resuming, {len(done_before)} of {candidates} candidates are already done" in log
    assert len(list((path / "artifacts/channel_saliency").iterdir())) == candidates
