"""Where runs are recorded: MLFLOW_TRACKING_URI, else mlflow.db in the checkout that the user sees."""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nirvana.errors import InputError

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "nirvana"
DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"


def history_root(directory: Path | None = None) -> Path:
    """Return the checkout whose history a run joins.

    `dvc exp run --temp` and `--queue` work in copies below .dvc/tmp/exps of the user's checkout and remove them.
    """
    directory = (directory or Path.cwd()).resolve()
    for parent in directory.parents:
        if directory.is_relative_to(parent / ".dvc" / "tmp" / "exps"):
            return parent
    return directory


def tracking_uri() -> str:
    """Return the store's URI, possibly with credentials."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{history_root() / DATABASE}"


def public_uri() -> str:
    """Return the store's URI without credentials, and without this machine's directories if it is the default."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    return without_credentials(given).partition("?")[0] if given else f"sqlite:///{DATABASE}"


def without_credentials(text: str) -> str:
    """Return a text without the user and password of the URLs in it."""
    return re.sub(r"://[^/\s]*@", "://", text)


def is_reachable_default() -> bool:
    """Return False if the default store is in use and its database is gone."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI")) or (history_root() / DATABASE).is_file()


@contextmanager
def open_store() -> Iterator[tuple["MlflowClient", str]]:
    """Yield a client and the id of our experiment; one process at a time for the default store.

    Raises:
        InputError: If the store does not answer.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow
    from mlflow.exceptions import MlflowException

    root = history_root()
    guard = root / ".cache" / "mlflow.lock"
    guard.parent.mkdir(parents=True, exist_ok=True)
    with guard.open("w") as lock:
        # find-or-create is two calls, and a new database migrates itself: parallel experiments take turns
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            client = mlflow.MlflowClient(tracking_uri())
            yield client, _experiment_id(client, root)
        except MlflowException as error:
            answer = without_credentials(error.message)[:200]
            raise InputError(
                f"MLflow at {public_uri()}: expected a store that takes this run, got {answer!r}; check "
                "MLFLOW_TRACKING_URI or unset it"
            ) from error


def _experiment_id(client: "MlflowClient", root: Path) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    found = client.get_experiment_by_name(name)
    if found:
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return found.experiment_id
    local = not os.environ.get("MLFLOW_TRACKING_URI")
    return client.create_experiment(name, artifact_location=(root / ARTIFACTS).as_uri() if local else None)
