"""A checkout whose fifteen steps are toys: the real flow, registry, parameters, DVC and MLflow, milliseconds of work.

A toy step writes a digest of its inputs and declared parameters, so a wrong output shows, and a line to
.cache/runs.log, so that a recomputation shows.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tasks.registry import EXPERIMENT, STEPS

ROOT = Path(__file__).resolve().parent.parent

_COPIED = (
    ".dvc/config",
    ".dvc/.gitignore",
    ".dvcignore",
    ".gitignore",
    "params.yaml",
    "pyproject.toml",
    "flows/__init__.py",
    "flows/early.py",
    "flows/environment.py",
    "flows/kill_with_parent.py",
    "flows/own_files.py",
    "flows/pipeline.py",
    "flows/prefect_server.py",
    "flows/step.py",
    "flows/summary.py",
    "flows/verify.py",
    "flows/server.py",
    "flows/serve.py",
    "nirvana/device.py",
    "nirvana/allocation.py",
    "nirvana/architectures/__init__.py",
    "nirvana/architectures/site.py",
    "nirvana/errors.py",
    "nirvana/files.py",
    "nirvana/methods/__init__.py",
    "nirvana/methods/method.py",
    "nirvana/methods/registry.py",
    "nirvana/presets.py",
    "tasks/__init__.py",
    "tasks/__main__.py",
    "tasks/sources/__init__.py",
    "tasks/tracking/__init__.py",
    "tasks/evaluation/__init__.py",
    "tasks/provenance/__init__.py",
    "tasks/workers/__init__.py",
    "tasks/check.py",
    "tasks/workers/child.py",
    "tasks/provenance/code_files.py",
    "tasks/estimates/__init__.py",
    "tasks/estimates/__main__.py",
    "tasks/estimates/table.py",
    "tasks/provenance/integrity.py",
    "tasks/evaluation/lm_eval_task.py",
    "tasks/tracking/loopback.py",
    "tasks/tracking/mlflow_names.py",
    "tasks/tracking/mlflow_store.py",
    "tasks/params.py",
    "tasks/workers/process.py",
    "tasks/record.py",
    "tasks/tracking/redaction.py",
    "tasks/registry.py",
    "tasks/sources/source.py",
    "tasks/tracking/sqlite_file.py",
    "tasks/evaluation/task_names.py",
)

_TOY = """
import hashlib, json, os, time
from pathlib import Path
from nirvana.errors import InputError
from nirvana.files import write_json

def content(path):
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return b"".join(file.read_bytes() for file in files)

def toy(name, values, inputs, outputs):
    with Path(".cache/runs.log").open("a") as log:
        log.write(name + "\\n")
    import logging, sys
    logging.getLogger("toy").info("toy %s works", name)
    if os.environ.get("TOY_FAILS") == name:
        raise InputError("toy: expected a good day, got a bad one; try tomorrow")
    if os.environ.get("TOY_SLEEPS") == name:
        Path(".cache/asleep").write_text(str(os.getpid()))
        time.sleep(6)
        Path(".cache/woke").write_text(name)
    if os.environ.get("TOY_FILLS_DISK") == name:
        raise OSError(28, "No space left on device", "artifacts/x")
    state = hashlib.sha256(name.encode() + json.dumps(values).encode())
    for key in sorted(inputs):
        state.update(content(inputs[key]))
    number = int(state.hexdigest()[:6], 16) / 16**6
    for key, path in outputs.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if key in REPORTS:
            write_json(path, REPORTS[key](number))
        elif path.suffix == ".csv":
            path.write_text(TABLES[key] % number)
        elif path.suffix:
            path.write_text(state.hexdigest())
        else:
            path.mkdir(exist_ok=True)
            (path / "content.txt").write_text(state.hexdigest())

def evaluation(x):
    return {"token_perplexity": 10 + x, "tasks": {"cloze": {"metric": "acc", "value": x, "stderr": 0.01, "items": 9}}}

def side(x):
    return {"parameters": 1000, "checkpoint_bytes": 4000, "prefill_tokens_per_second": 10 * x,
            "decode_tokens_per_second": x, "peak_bytes": 123456}

TABLES = {
    "kl_scores": "candidate,kl_divergence,selected\\n0,%r,1\\n",
    "allocation": "layer,module,units,kept,kept_share,weights,kept_weights\\n0,mlp,10,8,0.8,100,%r\\n",
    "recovery_curve": "tokens,training_loss,heldout_loss,heldout_kl\\n64,,%r,\\n",
}
REPORTS = {
    "evaluation": evaluation,
    "evaluation_dense": evaluation,
    "lm_eval": lambda x: {"results": x},
    "lm_eval_dense": lambda x: {"results": x},
    "selection": lambda x: {"selected": 0, "kl_divergence": x, "mean": x, "margin": None, "scores": [x]},
    "divergence": lambda x: {"kl_divergence": None},
    "recovery": lambda x: {"form": "none", "tokens": 0, "heldout_loss": {"dense": x, "pruned": x, "recovered": x}},
    "benchmark": lambda x: {"dense": side(x), "pruned": side(x), "ratio": {}, "warning": None},
    "plan": lambda x: {"model": {"model_type": "toy"}, "allocation": {"pruning_ratio": 0.2},
                       "achieved_ratio": {"total": x, "attention": x, "mlp": x}, "sites": []},
}
"""

_STEP = '''"""Toy."""
from dataclasses import astuple, is_dataclass
from tasks.toy import toy

def run(params, inputs, outputs):
    values = [{values}]
    toy("{name}", [astuple(v) if is_dataclass(v) else v for v in values], inputs, outputs)
'''

_STUBS = {
    "nirvana/__init__.py": "",
    "nirvana/checkpoint/modeling_nirvana.py": "# a stub\n",
    # the checkout is first on the path: steps that ask for torch get this one at once
    "torch.py": (
        "from types import SimpleNamespace\n"
        "backends = SimpleNamespace(cudnn=SimpleNamespace())\n"
        "set_num_threads = use_deterministic_algorithms = set_float32_matmul_precision = lambda value: None\n"
    ),
    "tasks/pictures/plots.py": "def figures(inputs):\n    return {'toy': '<svg xmlns=\"http://www.w3.org/2000/svg\"/>'}\n",
    "tasks/toy.py": _TOY,
}


def environment(**variables: str) -> dict[str, str]:
    """Return an environment in which nothing of the caller's Prefect, MLflow or DVC is left."""
    ours = ("PREFECT_", "MLFLOW_", "DVC_", "NIRVANA_", "HF_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    quiet = {"DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return kept | quiet | variables


def toy_checkout(path: Path) -> Path:
    """Make a git repository with toy steps at `path`, committed, and return it."""
    for name in _COPIED:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, path / name)
    for step in STEPS:
        if step.name == "record":
            continue
        keys = EXPERIMENT if step.params == EXPERIMENT else step.params
        values = ", ".join(f"params.{key}" for key in keys)
        (path / step.module).write_text(_STEP.format(values=values, name=step.name), encoding="utf-8")
    for name, text in _STUBS.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text, encoding="utf-8")
    (path / "reports").mkdir()
    (path / "reports/.gitkeep").touch()
    (path / ".git").exists() or command(path, "git", "init", "-q", "-b", "main")
    command(path, sys.executable, "-m", "tasks", "--render")
    command(path, "git", "add", "-A")
    commit(path, "toy")
    return path


def commit(path: Path, message: str) -> None:
    """Commit everything that git does not ignore."""
    identity = ("-c", "user.name=toy", "-c", "user.email=toy@example.org")
    command(path, "git", "add", "-A")
    command(path, "git", *identity, "commit", "-q", "--allow-empty", "-m", message)


def command(path: Path, *arguments: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout and return it with its output."""
    done = subprocess.run(
        arguments, cwd=path, env=environment(**variables), capture_output=True, text=True, timeout=900, check=False
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(arguments)} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def dvc(path: Path, *arguments: str, **keywords: object) -> subprocess.CompletedProcess[str]:
    """Run a DVC command in the checkout."""
    return command(path, sys.executable, "-m", "dvc", *arguments, **keywords)  # type: ignore[arg-type]


def runs(path: Path) -> list[str]:
    """Return the toy steps that ran, in order, and forget them."""
    log = path / ".cache/runs.log"
    names = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return names


def set_param(path: Path, old: str, new: str) -> None:
    """Replace a text in params.yaml."""
    file = path / "params.yaml"
    text = file.read_text(encoding="utf-8")
    assert old in text, f"{old!r} is not in params.yaml"
    file.write_text(text.replace(old, new), encoding="utf-8")
