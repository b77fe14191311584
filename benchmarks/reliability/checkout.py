"""A checkout of this code with a tiny model and corpus beside it, in which the real steps run under the real DVC."""

import compileall
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from nirvana.files import read_json, write_json
from tasks.params import load_params
from tasks.registry import STEPS
from tasks.workers.process import read_record

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / ".cache/reliability"
"""Where a stopped run goes on."""

_CODE = ("flows", "tasks", "nirvana")
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
from tasks.workers.child import DRIVER_PID
from tasks.tracking.mlflow_store import is_store_fault
from tasks.record import is_recorded
from tasks.registry import STEPS
os.environ[DRIVER_PID] = str(os.getpid())
names = [step.name for step in STEPS]
for step in STEPS[names.index(sys.argv[1]) : names.index(sys.argv[2]) + 1]:
    try:
        force = step.name == "record" and not is_recorded()
        bring_up_to_date(step.name, logging.getLogger("drive"), 60, force)
    except StepFailedError as error:
        if step.name == "record" and is_store_fault(str(error)):
            sys.exit(print(f"WARNING not recorded: {error}"))
        sys.exit(f"error: {error}")
"""
_OURS = ("PREFECT_", "MLFLOW_", "DVC_", "NIRVANA_", "HF_")
_QUIET = {
    "DVC_NO_ANALYTICS": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONDONTWRITEBYTECODE": "1",  # the checkouts are compiled when they are made
}


@dataclass(frozen=True)
class Prepared:
    """A pipeline that ran once, undisturbed.

    Attributes:
        before: The checkout as it was before each step.
        seconds: How long each step took from the driver's start to its end, and the part of it in the step's process.
        finished: The checkout after the last of them.
    """

    before: dict[str, Path]
    seconds: dict[str, tuple[float, float]]
    finished: Path


def prepared(work: Path = WORK) -> Prepared:
    """Return the undisturbed run kept below `work`; made anew if what the steps depend on has changed since."""
    kept = work / "prepared.json"
    known = read_json(kept) if kept.exists() else {}
    if known.get("stages") == stages_digest():
        names = {step.name: work / f"before-{step.name}" for step in STEPS}
        return Prepared(names, {name: tuple(each) for name, each in known["seconds"].items()}, work / "checkout")
    kept.unlink(missing_ok=True)
    for old in [*work.glob("before-*"), *(work / name for name in ("checkout", "model", "corpus"))]:
        shutil.rmtree(old, ignore_errors=True)
    made = prepare(work, [step.name for step in STEPS])
    write_json(kept, {"stages": stages_digest(), "seconds": made.seconds})
    return made


def prepare(parent: Path, names: list[str]) -> Prepared:
    """Run everything up to the last of these steps once.

    Args:
        parent: Receives the checkouts.
        names: Steps before which the checkout is kept.
    """
    path = make_checkout(parent)
    made = Prepared({}, {}, path)
    for step in STEPS:
        if step.name in names:
            made.before[step.name] = copy_checkout(path, parent / f"before-{step.name}")
        begun = time.monotonic()
        status, said = finish(path, step.name, first=step.name)
        if status:
            raise RuntimeError(f"{step.name}: the undisturbed run failed:\n{said}")
        inside = float((read_record(step.name, path) or {}).get("seconds", 0.0))
        made.seconds[step.name] = (round(time.monotonic() - begun, 1), inside)
        if set(names) <= made.before.keys():
            break
    return made


def stages_digest() -> str:
    """Return a digest of the sizes and of all code that a stage of dvc.yaml depends on."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"].values()
    files = {ROOT / name for stage in stages for name in stage["deps"] if (ROOT / name).suffix == ".py"}
    content = [json.dumps(_SIZES).encode(), *(file.read_bytes() for file in (ROOT / "dvc.yaml", *sorted(files)))]
    return hashlib.sha256(b"\0".join(content)).hexdigest()


def code_digest() -> str:
    """Return a short digest of all code that a checkout has."""
    files = sorted(file for part in _CODE for file in (ROOT / part).rglob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:12]


def make_checkout(parent: Path) -> Path:
    """Make `parent`/checkout, a git repository of its own, with `parent`/model and `parent`/corpus beside it."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import tiny_corpus, tiny_llama  # type: ignore[import-not-found]

    parent.mkdir(parents=True, exist_ok=True)
    tiny_llama(parent / "model", intermediate_size=96)
    tiny_corpus(parent / "corpus")
    path = parent / "checkout"
    for part in _CODE:
        shutil.copytree(ROOT / part, path / part, ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(path / part, quiet=2)
    for part in ("dvc.yaml", "pyproject.toml", ".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore"):
        (path / part).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / part, path / part)
    (path / "reports").mkdir()
    (path / "params.yaml").write_text(json.dumps(small_params(), indent=1), encoding="utf-8")
    for command in (("init", "-q"), ("add", "-A"), ("-c", "user.name=n", "-c", "user.email=n@n", "commit", "-qm", "n")):
        subprocess.run(["git", *command], cwd=path, check=True, capture_output=True)
    return path


def small_params(**changes: dict[str, object]) -> dict[str, Any]:
    """Return the content of params.yaml with sizes that take seconds, then `changes`, by section and key."""
    values = asdict(load_params(ROOT / "params.yaml"))
    for source in (_SIZES, changes):
        for section, keys in source.items():
            values[section] |= keys
    return values


def copy_checkout(path: Path, target: Path) -> Path:
    """Copy a checkout as it is, links and times included; the model and the corpus stay where they are.

    Code that was edited since follows: that no stage depends on it `prepared` has seen to.
    """
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "-a", str(path), str(target)], check=True)
    for part in _CODE:
        for file in (ROOT / part).rglob("*.py"):
            copied = target / file.relative_to(ROOT)
            if not copied.exists() or copied.read_bytes() != file.read_bytes():
                shutil.copyfile(file, copied)
    return target


def environment() -> dict[str, str]:
    """Return the variables of everything that runs in a checkout: none of ours comes in from outside."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(_OURS) and key != "PYTHONPATH"}
    return variables | _QUIET


def start(
    path: Path, until: str = STEPS[-1].name, prefect: bool = False, first: str = STEPS[0].name
) -> "subprocess.Popen[bytes]":
    """Start the steps up to one, in a process group of their own; what they say goes to `said_file`.

    Args:
        path: The checkout.
        until: The last step.
        prefect: Whether as `python -m flows.pipeline`, which begins with the first of all steps.
        first: The first step; those before it are done.
    """
    command = ["-m", "flows.pipeline", "--until", until] if prefect else ["-c", _DRIVE, first, until]
    with said_file(path).open("wb") as said:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=path,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def said_file(path: Path) -> Path:
    """Return where the output of the last driver in a checkout is."""
    return path.with_name(f"{path.name}.log")


def finish(
    path: Path, until: str = STEPS[-1].name, prefect: bool = False, first: str = STEPS[0].name
) -> tuple[int, str]:
    """Run the steps up to one and return the exit status and all output."""
    status = start(path, until, prefect, first).wait(timeout=1800)
    return status, said_file(path).read_text(encoding="utf-8", errors="replace")
