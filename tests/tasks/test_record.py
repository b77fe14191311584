"""One experiment, one MLflow run, in a real store."""

import json
import re
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from toy import command, commit, dvc, toy_checkout

from nirvana.errors import InputError
from tasks import record
from tasks.provenance.integrity import note_outputs
from tasks.tracking.mlflow_store import history_root, public_uri

DIGEST = "nirvana.experiment_digest"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy checkout after `dvc repro`."""
    path = toy_checkout(tmp_path_factory.mktemp("checkout"))
    dvc(path, "repro")
    return path


@pytest.fixture
def client(checkout: Path) -> Iterator[object]:
    import mlflow

    yield mlflow.MlflowClient(f"sqlite:///{checkout / 'mlflow.db'}")


def run_of(client, checkout: Path):
    return client.get_run(json.loads((checkout / "reports/mlflow_run.json").read_text())["run_id"])


def record_again(checkout: Path, **variables: str) -> None:
    command(checkout, sys.executable, "-m", "tasks", "record", **variables)


@pytest.mark.slow
def test_the_run_holds_the_experiment(checkout: Path, client) -> None:
    run = run_of(client, checkout)
    assert run.info.status == "FINISHED"
    assert run.data.params["allocation.gamma"] == "3.36"
    assert run.data.params["evaluation.tasks"] == "['cloze']"
    assert not any(key.startswith("runtime") for key in run.data.params)
    evaluation = json.loads((checkout / "reports/evaluation.json").read_text())
    plan = json.loads((checkout / "artifacts/plan.json").read_text())
    assert run.data.metrics["evaluation.token_perplexity"] == evaluation["token_perplexity"]
    assert run.data.metrics["evaluation.tasks.cloze.value"] == evaluation["tasks"]["cloze"]["value"]
    assert run.data.metrics["plan.achieved_ratio.mlp"] == plan["achieved_ratio"]["mlp"]
    assert {"benchmark.pruned.peak_bytes", "kept_share_by_layer.mlp"} <= set(run.data.metrics)
    (point,) = client.get_metric_history(run.info.run_id, "recovery.heldout_loss_by_tokens")
    recovery = json.loads((checkout / "reports/recovery.json").read_text())
    assert (point.step, point.value) == (64, recovery["heldout_loss"]["pruned"])
    assert run.data.metrics["recovery.heldout_loss.dense"] == recovery["heldout_loss"]["dense"]
    assert "nirvana.recovered.md5" not in run.data.tags
    stages = yaml.safe_load((checkout / "dvc.lock").read_text())["stages"]
    assert run.data.tags["nirvana.checkpoint.path"] == "artifacts/checkpoint"
    assert run.data.tags["nirvana.checkpoint.md5"] == stages["prune"]["outs"][0]["md5"]
    assert run.data.tags["mlflow.source.git.commit"] == command(checkout, "git", "rev-parse", "HEAD").stdout.strip()
    assert run.data.tags["nirvana.git_dirty"] == "false"
    digests = {item.dataset.name: item.dataset.digest for item in run.inputs.dataset_inputs}
    assert digests["corpus"] == stages["fetch_corpus"]["outs"][0]["md5"]
    assert set(digests) == {
        "corpus",
        "calibration pool",
        "compensation text",
        "held-out batch",
        "evaluation documents",
    }
    files = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"plan.json", "report.html", "kl_scores.csv", "recovery.csv", "dvc.lock", "figures"} <= files
    assert not any("checkpoint" in file for file in files)


@pytest.mark.slow
def test_recording_twice_is_recording_once(checkout: Path, client) -> None:
    before = run_of(client, checkout)
    (checkout / "reports/mlflow_run.json").unlink()
    record_again(checkout)
    after = run_of(client, checkout)
    assert after.info.run_id == before.info.run_id
    assert len(client.search_runs([before.info.experiment_id])) == 1
    assert len(client.get_metric_history(after.info.run_id, "evaluation.token_perplexity")) == 1
    assert len(after.inputs.dataset_inputs) == len(before.inputs.dataset_inputs)


@pytest.mark.slow
def test_a_new_measurement_updates_the_same_run(checkout: Path, client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    before = run_of(client, checkout)
    file = checkout / "reports/benchmark.json"
    measured = json.loads(file.read_text())
    measured["pruned"]["decode_tokens_per_second"] = 77.0
    file.write_text(json.dumps(measured))
    note_outputs([file.relative_to(checkout)])  # as `python -m tasks benchmark` does
    record_again(checkout)
    after = run_of(client, checkout)
    assert after.info.run_id == before.info.run_id
    assert after.data.metrics["benchmark.pruned.decode_tokens_per_second"] == 77.0
    assert record.is_recorded()
    dvc(checkout, "checkout", "--force")


@pytest.mark.slow
def test_a_tracking_uri_sends_the_run_elsewhere_without_telling_its_password(checkout: Path, tmp_path: Path) -> None:
    file = checkout / "reports/mlflow_run.json"
    before = file.read_bytes()
    record_again(checkout, MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path / 'team.db'}")
    said = json.loads(file.read_text())
    file.write_bytes(before)
    assert said["tracking_uri"] == f"sqlite:///{tmp_path / 'team.db'}"
    assert said["experiment_digest"] == json.loads(before)["experiment_digest"]
    with sqlite3.connect(tmp_path / "team.db") as database:
        assert database.execute("SELECT count(*) FROM runs WHERE status = 'FINISHED'").fetchone() == (1,)


@pytest.mark.slow
def test_an_unreachable_server_is_one_line_within_seconds(checkout: Path) -> None:
    start = time.monotonic()
    done = command(
        checkout,
        *(sys.executable, "-m", "tasks", "record"),
        check=False,
        MLFLOW_TRACKING_URI="http://user:secret@127.0.0.1:9/",
    )
    assert done.returncode == 2
    assert time.monotonic() - start < 20  # most of it imports
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: MLflow at http://127.0.0.1:9/: expected a store that takes this run")
    assert "secret" not in errors[0]


@pytest.mark.slow
def test_names_that_mlflow_refuses_are_made_fit_and_no_metric_is_lost(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five tasks of lm-eval have parentheses; two may differ in nothing else."""
    monkeypatch.chdir(checkout)
    file = checkout / "reports/evaluation.json"
    kept = file.read_bytes()
    said = json.loads(kept)
    names = ["egymmlu_arabic (Egypt)", "egymmlu_arabic [Egypt]", "egymmlu_arabic _Egypt_", "50%", "a//b", "x" * 300]
    for number, name in enumerate(names):
        said["tasks"][name] = {"metric": "acc", "value": number / 10, "stderr": None, "items": 9}
    file.write_text(json.dumps(said))
    note_outputs([file.relative_to(checkout)])  # as `python -m tasks evaluate` does
    database = tmp_path / "names.db"
    mlflow_run = (checkout / "reports/mlflow_run.json").read_bytes()
    record_again(checkout, MLFLOW_TRACKING_URI=f"sqlite:///{database}")
    record_again(checkout, MLFLOW_TRACKING_URI=f"sqlite:///{database}")
    (checkout / "reports/mlflow_run.json").write_bytes(mlflow_run)
    file.write_bytes(kept)
    with sqlite3.connect(database) as stored:
        values = dict(stored.execute("SELECT key, value FROM metrics WHERE key LIKE 'evaluation.tasks.%'"))
        counts = stored.execute("SELECT max(n) FROM (SELECT count(*) AS n FROM metrics GROUP BY key, step)").fetchone()
    assert values["evaluation.tasks.egymmlu_arabic _Egypt_.value"] == 0.2
    assert {0.0, 0.1, 0.2, 0.3, 0.4, 0.5} < set(values.values())
    assert len(values) == 2 * len(names) + 3  # value and items; cloze has a standard error too
    assert counts == (1,)


@pytest.mark.slow
def test_a_damaged_database_is_named_with_a_remedy_that_works(checkout: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkout"
    command(tmp_path, "cp", "-a", str(checkout), str(path))
    database = path / "mlflow.db"
    kept = database.read_bytes()
    for damaged in (kept[: len(kept) // 2], b"no database\n" * 100):
        database.write_bytes(damaged)
        start = time.monotonic()
        done = command(path, sys.executable, "-m", "tasks", "record", check=False)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False)
        assert time.monotonic() - start < 20
        assert "error: MLflow's database mlflow.db: expected one that can be written to, got" in done.stderr
        remedy = re.search(r"\((mv [^)]*)\)", done.stderr)[1]
        command(path, *remedy.split())
        record_again(path)
        assert (path / "mlflow.db.damaged").read_bytes() == damaged
    with sqlite3.connect(database) as stored:
        assert stored.execute("SELECT count(*) FROM runs WHERE status = 'FINISHED'").fetchone() == (1,)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flipped",
    [
        "metrics SET value = value * 2 WHERE key = 'evaluation.token_perplexity'",
        "latest_metrics SET value = value * 2 WHERE key = 'evaluation.token_perplexity'",
        "params SET value = '3.37' WHERE key = 'allocation.gamma'",
        "tags SET value = '0' WHERE key = 'nirvana.experiment_digest'",
    ],
    ids=lambda statement: statement.split()[0],
)
def test_a_value_that_changed_in_the_database_is_recorded_anew(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flipped: str
) -> None:
    """SQLite has no checksums: a flipped bit is another number, and no check of the database finds it."""
    path = tmp_path / "checkout"
    command(tmp_path, "cp", "-a", str(checkout), str(path))
    monkeypatch.chdir(path)

    def held() -> list[tuple[dict, dict]]:
        """Parameters and metrics, less the measured ones, of each run that is not deleted."""
        with closing(sqlite3.connect("mlflow.db")) as database:
            runs = database.execute("SELECT run_uuid FROM runs WHERE lifecycle_stage = 'active'").fetchall()
            asked = "SELECT key, value FROM {} WHERE run_uuid = ? AND key NOT LIKE 'benchmark.%'"
            return [
                tuple(dict(database.execute(asked.format(name), run)) for name in ("params", "latest_metrics"))
                for run in runs
            ]

    before = held()
    assert len(before) == 1 and record.is_recorded()
    with closing(sqlite3.connect("mlflow.db")) as database:
        assert database.execute(f"UPDATE {flipped}").rowcount > 0
        database.commit()
    assert not record.is_recorded()
    record_again(path)
    assert held() == before and record.is_recorded()
    assert "is not what was recorded: damaged or edited; recorded anew" in Path(".cache/steps/record.log").read_text()


@pytest.mark.slow
def test_what_a_user_adds_to_a_run_is_no_damage(checkout: Path, client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    run_id = run_of(client, checkout).info.run_id
    client.log_metric(run_id, "a_users_own", 1.0)
    client.set_tag(run_id, "mlflow.note.content", "the good one")
    assert record.is_recorded()
    (checkout / "mlflow.db").rename(checkout / "kept.db")
    assert not record.is_recorded()
    (checkout / "kept.db").rename(checkout / "mlflow.db")


@pytest.mark.slow
@pytest.mark.parametrize("query", ["", "?token=s3cretT0ken"])
def test_no_secret_is_left_anywhere(checkout: Path, tmp_path: Path, query: str) -> None:
    """A password with a slash is one that urllib takes for a port and complains about."""
    path = tmp_path / "checkout"
    command(tmp_path, "cp", "-a", str(checkout), str(path))
    uri = f"http://ann:s3cretPa/s3cretTail@127.0.0.1:9/{query}"
    done = command(path, sys.executable, "-m", "tasks", "record", check=False, MLFLOW_TRACKING_URI=uri)
    assert done.returncode == 2 and "MLflow at http://127.0.0.1:9/" in done.stderr
    assert "s3cret" not in done.stdout + done.stderr
    told = [file for file in path.rglob("*") if file.is_file() and b"s3cret" in file.read_bytes()]
    assert told == []


@pytest.mark.slow
def test_a_dirty_tree_is_said(tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    (checkout / "tasks/toy.py").write_text((checkout / "tasks/toy.py").read_text() + "\n")
    assert record._origin()["nirvana.git_dirty"] == "true"
    commit(checkout, "clean again")
    assert record._origin()["nirvana.git_dirty"] == "false"


@pytest.mark.slow
def test_a_failure_is_a_failed_run_with_its_error(checkout: Path, client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_id = record.record_failure("allocate: expected x, got y; do z", "allocate", Path(".cache/steps/allocate.log"))
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["nirvana.error"]) == ("FAILED", "allocate: expected x, got y; do z")
    assert DIGEST not in run.data.tags
    files = {item.path for item in client.list_artifacts(run_id)}
    assert files == {"error.txt", "allocate.log", "params.yaml"}


def stages(**changes: object) -> dict:
    return {
        "allocate": {
            "params": {"params.yaml": {"allocation": {"gamma": 3.36}}},
            "outs": [{"path": "artifacts/plan.json", "md5": changes.get("plan", "a")}],
        },
        "benchmark": {
            "params": {"params.yaml": {"benchmark": {"repeats": changes.get("repeats", 7)}}},
            "outs": [{"path": "reports/benchmark.json", "md5": changes.get("measured", "b")}],
        },
        "record": {"params": {"params.yaml": {"allocation": {"gamma": changes.get("recorded", 3.36)}}}},
    }


def test_the_digest_is_of_the_experiment_not_of_the_stopwatch() -> None:
    digest = record.experiment_digest(stages())
    assert len(digest) == 64
    assert record.experiment_digest(stages(measured="c", recorded=1.0)) == digest
    assert record.experiment_digest(stages(plan="z")) != digest
    assert record.experiment_digest(stages(repeats=3)) != digest


def test_parameters_that_changed_during_the_run_are_refused() -> None:
    mixed = stages()
    mixed["prune"] = {"params": {"params.yaml": {"allocation": {"gamma": 2.0}}}}
    with pytest.raises(InputError, match=r"expected one allocation.gamma for all stages, got 3.36 and, in prune, 2.0"):
        record.parameters(mixed)


def test_what_was_recovered_is_referred_to_only_if_something_was() -> None:
    def references(tokens: int) -> dict[str, str]:
        recover = {
            "params": {"params.yaml": {"recovery": {"tokens": tokens}}},
            "outs": [{"path": "artifacts/recovered", "md5": "c.dir"}],
        }
        return record._references(stages() | {"recover": recover})

    assert references(0) == {}
    assert references(64) == {
        "nirvana.recovered.path": "artifacts/recovered",
        "nirvana.recovered.md5": "c.dir",
    }


def test_a_missing_lock_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected the stages that DVC ran, found none; run `dvc repro`"):
        record.read_lock(tmp_path / "dvc.lock")


def test_a_queued_experiment_shares_the_history_of_its_checkout(tmp_path: Path) -> None:
    inner = tmp_path / "checkout" / ".dvc" / "tmp" / "exps" / "standalone" / "x"
    inner.mkdir(parents=True)
    assert history_root(inner) == tmp_path / "checkout"
    assert history_root(tmp_path / "checkout") == tmp_path / "checkout"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("http://user:secret@host:5000/x", "http://host:5000/x"),
        ("http://user:se/cr@et@host:5000/x?token=y", "http://host:5000/x"),
        ("postgresql+psycopg2://u:p@host/db?password=x", "postgresql+psycopg2://host/db"),
        ("sqlite:////tmp/a.db", "sqlite:////tmp/a.db"),
        ("", "sqlite:///mlflow.db"),
    ],
)
def test_no_credentials_are_written(given: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert public_uri() == shown


def test_a_run_elsewhere_or_of_another_experiment_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"stages": stages()}))
    (tmp_path / "reports").mkdir()
    good = SimpleNamespace(experiment_digest=record.experiment_digest(stages()), tracking_uri="http://host:5000")

    def recorded(**changes: str) -> bool:
        (tmp_path / "reports/mlflow_run.json").write_text(json.dumps(vars(good) | changes))
        return record.is_recorded(tmp_path)

    assert recorded()
    assert not recorded(experiment_digest="other")
    assert not recorded(tracking_uri="http://elsewhere")
    (tmp_path / "reports/mlflow_run.json").unlink()
    assert not record.is_recorded(tmp_path)
