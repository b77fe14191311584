"""A checkout of this code with a tiny model and corpus beside it, in which the real steps run under the real DVC."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from tasks.params import load_params
from tasks.registry import STEPS

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ("reports/benchmark.json", "reports/report.html", "reports/mlflow_run.json")
"""Outputs that hold measured times, or when and where the run was recorded: another run's differ."""

_SIZES = {
    "model": {"source": "path:../model"},
    "corpus": {"source": "path:../corpus/*.txt"},
    "calibration": {
        "pool_size": 6,
        "sequences": 4,
        "sequence_length": 64,
        "heldout_sequences": 2,
        "heldout_length": 24,
    },
    "allocation": {"pruning_ratio": 0.3},
    "compensation": {"method": "least_squares", "sequences": 4, "sequence_length": 32, "self_generated": 2},
    "recovery": {"tokens": 4096, "sequence_length": 32, "curve_every": 1024},
    "evaluation": {"window": 32, "perplexity_tokens": 256, "cloze_items": 5},
    "benchmark": {"prompt_length": 8, "decode_tokens": 2, "repeats": 1, "warmup": 0},
    "compute": {"threads": 1},
}

# the flow's own code for one step after another; Prefect, which only shows them, costs ten seconds a start
_DRIVE = """
import logging, os, sys
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
import flows.environment
from flows.step import StepFailedError, bring_up_to_date
from tasks.child import DRIVER_PID
from tasks.registry import STEPS
os.environ[DRIVER_PID] = str(os.getpid())
for step in STEPS:
    try:
        bring_up_to_date(step.name, logging.getLogger("drive"), 60)
    except StepFailedError as error:
        sys.exit(f"error: {error}")
    if step.name == sys.argv[1]:
        break
"""


def make_checkout(parent: Path) -> Path:
    """Make `parent`/checkout, a git repository of its own, with `parent`/model and `parent`/corpus beside it."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import tiny_corpus, tiny_llama  # type: ignore[import-not-found]

    tiny_llama(parent / "model", intermediate_size=96)
    tiny_corpus(parent / "corpus")
    path = parent / "checkout"
    for part in ("flows", "tasks", "nirvana"):
        shutil.copytree(ROOT / part, path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("dvc.yaml", "pyproject.toml", ".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore"):
        (path / part).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / part, path / part)
    (path / "reports").mkdir()
    values = asdict(load_params(ROOT / "params.yaml"))
    for section, keys in _SIZES.items():
        values[section] |= keys
    (path / "params.yaml").write_text(json.dumps(values, indent=1), encoding="utf-8")
    for command in (("init", "-q"), ("add", "-A"), ("-c", "user.name=n", "-c", "user.email=n@n", "commit", "-qm", "n")):
        subprocess.run(["git", *command], cwd=path, check=True, capture_output=True)
    return path


def copy_checkout(path: Path, target: Path) -> Path:
    """Copy a checkout as it is, links and times included; the model and the corpus stay where they are."""
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "-a", str(path), str(target)], check=True)
    return target


def start(path: Path, until: str = STEPS[-1].name) -> "subprocess.Popen[str]":
    """Start the steps up to one, in a process group of their own."""
    ours = ("PREFECT_", "MLFLOW_", "DVC_", "NIRVANA_", "HF_")
    variables = {key: value for key, value in os.environ.items() if not key.startswith(ours) and key != "PYTHONPATH"}
    quiet = {"DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", _DRIVE, until],
        cwd=path,
        env=variables | quiet,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(path: Path, until: str = STEPS[-1].name) -> tuple[int, str]:
    """Run the steps up to one and return the exit status and all output."""
    process = start(path, until)
    said, _ = process.communicate(timeout=1800)
    return process.returncode, said


def output_files(path: Path, until: str = STEPS[-1].name) -> dict[str, bytes]:
    """Return what the steps up to one wrote, less what is measured."""
    names = [step.name for step in STEPS]
    found: dict[str, bytes] = {}
    for step in STEPS[: names.index(until) + 1]:
        for out in step.outs.values():
            place = path / out.path
            files = sorted(place.rglob("*")) if place.is_dir() else [place]
            found |= {file.relative_to(path).as_posix(): file.read_bytes() for file in files if file.is_file()}
    return {name: content for name, content in found.items() if name not in MEASURED}
