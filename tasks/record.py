"""Record the experiment as one MLflow run, from the files and dvc.lock; never from inside another step.

A restored step runs no code, so logging inside the steps would leave holes. The run is found again by the digest
of what was computed, so that recording twice is recording once.
"""

import csv
import hashlib
import json
import logging
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nirvana.errors import InputError
from nirvana.files import read_json, write_json
from nirvana.presets import resolve_presets
from tasks.tracking.mlflow_names import LONGEST_SOURCE, LONGEST_TAG, NAMES_AT_ONCE, fit_names, fit_value
from tasks.tracking.mlflow_store import is_reachable_default, open_store, public_uri, store_fault, stored_values
from tasks.tracking.redaction import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from tasks.params import Params

LOCK = Path("dvc.lock")
RUN_FILE = Path("reports/mlflow_run.json")
DIGEST_TAG = "nirvana.experiment_digest"
CHECKPOINT = "artifacts/checkpoint"
RECOVERED = "artifacts/recovered"

# what they write is a measurement, or shows one: it differs each time, the experiment does not
_MEASURING = ("benchmark", "report", "record")
# dataset name -> (path, what it served for)
_DATASETS = {
    "corpus": ("data/corpus", "source"),
    "calibration pool": ("data/candidates.safetensors", "calibration"),
    "compensation text": ("data/compensation.safetensors", "compensation"),
    "held-out batch": ("data/heldout.safetensors", "selection"),
    "evaluation documents": ("data/evaluation", "evaluation"),
}

logger = logging.getLogger(__name__)


def run(params: "Params", inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> None:
    """Find or create the MLflow run of this experiment and write reports/mlflow_run.json."""
    stages = read_lock()
    digest = experiment_digest(stages)
    with open_store() as (client, experiment_id):
        _drop_damaged(client)
        run_id, is_new = _find_or_create(client, experiment_id, digest, inputs)
        _log_parameters(client, run_id, resolve_presets(parameters(stages)))
        _log_metrics(client, run_id, inputs)
        _log_datasets(client, run_id, stages)
        for tag, value in _references(stages).items():
            client.set_tag(run_id, tag, value)
        _log_files(client, run_id, inputs)
        if client.get_run(run_id).info.status != "FINISHED":
            client.set_terminated(run_id, "FINISHED")
    write_json(
        outputs["mlflow_run"],
        {
            "run_id": run_id,
            "experiment_id": experiment_id,
            "tracking_uri": public_uri(),
            "experiment_digest": digest,
            "stored": stored_values(run_id),
        },
    )
    logger.info("%s MLflow run %s at %s", "created" if is_new else "updated", run_id, public_uri())


def read_lock(path: Path = LOCK) -> dict[str, Any]:
    """Return the stages of dvc.lock.

    Raises:
        InputError: If there is no dvc.lock, or it holds no stage.
    """
    import yaml

    try:
        stages = yaml.safe_load(path.read_text(encoding="utf-8"))["stages"]
    except (OSError, KeyError, TypeError, ValueError, RecursionError, yaml.YAMLError):
        raise InputError(f"{path}: expected the stages that DVC ran, found none; run `dvc repro`") from None
    return stages


def experiment_digest(stages: Mapping[str, Any]) -> str:
    """Return the SHA-256 of every parameter and of every output that the parameters determine."""
    outputs = {
        out["path"]: out["md5"]
        for name, stage in stages.items()
        if name not in _MEASURING
        for out in stage.get("outs", [])
    }
    content = {"parameters": parameters(stages), "outputs": outputs}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def parameters(stages: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that the stages ran with, by dotted key: what was, not what params.yaml says by now.

    Raises:
        InputError: If two stages ran with different values, because params.yaml changed in between.
    """
    values: dict[str, Any] = {}
    for name, stage in stages.items():
        if name == "record":
            continue
        for key, value in _flatten(stage.get("params", {}).get("params.yaml", {})):
            if values.setdefault(key, value) != value:
                raise InputError(
                    f"{LOCK}: expected one {key} for all stages, got {values[key]!r} and, in {name}, {value!r}; "
                    "params.yaml changed during the run: run the same command again"
                )
    return values


def is_recorded(root: Path | str = ".") -> bool:
    """Return whether the current experiment is known to be in the current MLflow store."""
    try:
        found = read_json(Path(root) / RUN_FILE)
        digest = experiment_digest(read_lock(Path(root) / LOCK))
        same = (found["experiment_digest"], found["tracking_uri"]) == (digest, public_uri())
        return same and is_reachable_default() and _is_as_recorded(found)
    except (LookupError, TypeError, ValueError, AttributeError, OSError):  # another form than we write, or none
        return False


def _is_as_recorded(found: Mapping[str, Any]) -> bool:
    """Return whether the default store still holds what was recorded; another store looks after itself."""
    stored = found.get("stored")
    return stored == _stored_now(found) and (stored is None or store_fault() is None)


def _stored_now(found: Mapping[str, Any]) -> dict[str, Any] | None:
    return stored_values(found.get("run_id", ""), found["stored"]["until"] if found.get("stored") else None)


def _drop_damaged(client: "MlflowClient") -> None:
    """Move a run whose parameters, metrics or digest are not what was recorded to the deleted ones of the store."""
    with suppress(InputError, KeyError, TypeError):
        found = read_json(RUN_FILE)
        if found["tracking_uri"] != public_uri() or not found.get("stored"):
            return
        now = _stored_now(found)
        if not now or now == found["stored"]:  # cannot be read just now, or is as it was
            return
        run_id = found["run_id"]
        for run in client.search_runs([found["experiment_id"]], f"attributes.run_id = '{run_id}'", max_results=1):
            logger.warning("MLflow run %s is not what was recorded: damaged or edited; recorded anew", run.info.run_id)
            client.delete_run(run_id)


def record_failure(error: str, step: str, log: Path | None = None) -> str:
    """Record a FAILED run that says why; return its id.

    Args:
        error: One line.
        step: The step that failed.
        log: The step's log, kept beside the error if it exists.
    """
    with open_store() as (client, experiment_id):
        error = redact(error)
        tags = {"nirvana.failed_step": step, "nirvana.error": fit_value(error, LONGEST_TAG), **_origin()}
        run_id = client.create_run(experiment_id, tags=tags, run_name=f"failed in {step}").info.run_id
        client.log_text(run_id, error + "\n", "error.txt")
        if log and log.is_file():
            client.log_artifact(run_id, str(log))
        if Path("params.yaml").is_file():
            client.log_artifact(run_id, "params.yaml")
        client.set_terminated(run_id, "FAILED")
    return run_id


def _find_or_create(
    client: "MlflowClient", experiment_id: str, digest: str, inputs: Mapping[str, Path]
) -> tuple[str, bool]:
    found = client.search_runs([experiment_id], f"tags.`{DIGEST_TAG}` = '{digest}'", max_results=1)
    if found:
        return found[0].info.run_id, False
    plan = read_json(inputs["plan"])
    name = f"{plan['model']['model_type']} {plan['allocation']['pruning_ratio']:.0%} {digest[:7]}"
    return client.create_run(experiment_id, tags={DIGEST_TAG: digest, **_origin()}, run_name=name).info.run_id, True


def _log_parameters(client: "MlflowClient", run_id: str, values: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    known, name = client.get_run(run_id).data.params, fit_names(values)
    new = [Param(name[key], fit_value(value)) for key, value in values.items() if name[key] not in known]
    for start in range(0, len(new), NAMES_AT_ONCE):
        client.log_batch(run_id, params=new[start : start + NAMES_AT_ONCE])


def _log_metrics(client: "MlflowClient", run_id: str, inputs: Mapping[str, Path]) -> None:
    """Log what changed only: a metric logged twice is a history with two points."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    known = client.get_run(run_id).data.metrics
    scalars, points = dict(_scalars(inputs)), list(_series(inputs))
    name = fit_names([*scalars, *(key for key, _, _ in points)])
    batch = [Metric(name[key], value, now, 0) for key, value in scalars.items() if known.get(name[key]) != value]
    series = [Metric(name[key], value, now, index) for key, index, value in points if name[key] not in known]
    everything = batch + series
    for start in range(0, len(everything), 1000):  # the server's limit a batch
        client.log_batch(run_id, metrics=everything[start : start + 1000])


def _scalars(inputs: Mapping[str, Path]) -> Iterator[tuple[str, float]]:
    plan = read_json(inputs["plan"])
    documents = {
        "plan": {"requested_ratio": plan["allocation"]["pruning_ratio"], "achieved_ratio": plan["achieved_ratio"]},
        "selection": {key: value for key, value in read_json(inputs["selection"]).items() if key != "scores"},
        **{name: read_json(inputs[name]) for name in ("recovery", "evaluation", "evaluation_dense", "benchmark")},
        "kl_divergence": _divergence(inputs),
    }
    for key, value in _flatten(documents):
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield key, float(value)


def _divergence(inputs: Mapping[str, Path]) -> float:
    """Return the KL of the checkpoint: measured on it, or known from the selection."""
    measured = read_json(inputs["divergence"])["kl_divergence"]
    return read_json(inputs["selection"])["kl_divergence"] if measured is None else measured


def _series(inputs: Mapping[str, Path]) -> Iterator[tuple[str, int, float]]:
    for candidate, score in enumerate(read_json(inputs["selection"])["scores"]):
        yield "kl_divergence_by_candidate", candidate, float(score)
    with inputs["recovery_curve"].open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name in ("training_loss", "heldout_loss", "heldout_kl"):
                if row[name]:
                    yield f"recovery.{name}_by_tokens", int(row["tokens"]), float(row[name])
    with inputs["allocation"].open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield f"kept_share_by_layer.{row['module']}", int(row["layer"]), float(row["kept_share"])


def _log_datasets(client: "MlflowClient", run_id: str, stages: Mapping[str, Any]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    digests = _output_digests(stages)
    source = fit_value(json.dumps({"source": parameters(stages).get("corpus.source")}), LONGEST_SOURCE)
    logged = client.get_run(run_id).inputs
    known = {item.dataset.digest for item in logged.dataset_inputs} if logged else set()
    datasets = [
        DatasetInput(
            Dataset(name=name, digest=digests[path], source_type="dvc", source=source),
            [InputTag("mlflow.data.context", use), InputTag("dvc.path", path), InputTag("dvc.md5", digests[path])],
        )
        for name, (path, use) in _DATASETS.items()
        if path in digests and digests[path] not in known
    ]
    if datasets:
        client.log_inputs(run_id, datasets)


def _references(stages: Mapping[str, Any]) -> dict[str, str]:
    """Return tags that point to what is too big to copy."""
    digests = _output_digests(stages)
    big = {"checkpoint": CHECKPOINT, "model": "data/model"}
    if parameters(stages).get("recovery.tokens"):
        big["recovered"] = RECOVERED
    return {
        f"nirvana.{name}.{what}": value
        for name, path in big.items()
        if path in digests
        for what, value in (("path", path), ("md5", digests[path]))
    }


def _output_digests(stages: Mapping[str, Any]) -> dict[str, str]:
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", []) if "md5" in out}


def _log_files(client: "MlflowClient", run_id: str, inputs: Mapping[str, Path]) -> None:
    from tasks.pictures.plots import figures

    for name in (
        "plan",
        "selection",
        "divergence",
        "report",
        "kl_scores",
        "allocation",
        "recovery",
        "recovery_curve",
        "lm_eval",
        "lm_eval_dense",
        "benchmark",
    ):
        client.log_artifact(run_id, str(inputs[name]))
    client.log_artifact(run_id, str(LOCK))
    for name, drawing in figures(inputs).items():
        client.log_text(run_id, drawing, f"figures/{name}.svg")


def _origin() -> dict[str, str]:
    """Return tags that say which code made the run, and who."""
    tags = {"mlflow.source.type": "LOCAL", "mlflow.source.name": "nirvana"}
    with suppress(KeyError, OSError):
        import getpass

        tags["mlflow.user"] = getpass.getuser()
    revision = _git("rev-parse", "HEAD")
    if revision:
        # parameters and dvc.lock are recorded themselves: dirty means that the code is not this commit's
        changes = _git("status", "--porcelain", "--", ".", ":(exclude)params.yaml", ":(exclude)dvc.lock")
        tags |= {"mlflow.source.git.commit": revision, "nirvana.git_dirty": str(bool(changes)).lower()}
    return tags


def _git(*arguments: str) -> str:
    with suppress(OSError):
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return ""


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
