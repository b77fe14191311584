"""Where runs are recorded: MLFLOW_TRACKING_URI, else mlflow.db in the checkout that the user sees."""

import fcntl
import hashlib
import json
import os
import re
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from nirvana.errors import InputError
from tasks.tracking.loopback import keep_loopback_direct
from tasks.tracking.redaction import redact, with_quoted_password
from tasks.tracking.sqlite_file import database_fault

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "nirvana"
DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"
_STORE_FAULT = "MLflow"
"""How a line about the store begins."""
ANSWER_SECONDS = 5
"""How long a server may take to accept a connection."""

# seven tries of two minutes each are MLflow's own idea
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
_STORE_LIBRARIES = ("sqlalchemy", "alembic", "sqlite3", "requests", "urllib3", "psycopg2")


def is_store_fault(message: str) -> bool:
    """Tell whether a line of `record` blames the store alone: results stand, and are recorded once it is there."""
    return message.startswith(_STORE_FAULT)


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
    """Return the store's URI, possibly with credentials; a password may hold any character."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    return with_quoted_password(given) if given else f"sqlite:///{history_root() / DATABASE}"


def public_uri() -> str:
    """Return the store's URI without credentials, and without this machine's directories if it is the default."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    return without_credentials(tracking_uri()).partition("?")[0] if given else f"sqlite:///{DATABASE}"


def without_credentials(address: str) -> str:
    """Return an address without its user and password."""
    return re.sub(r"://[^/\s]*@", "://", with_quoted_password(address))


def is_reachable_default() -> bool:
    """Return False if the default store is in use and its database is gone."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI")) or (history_root() / DATABASE).is_file()


def stored_values(run_id: str, until: int | None = None) -> dict[str, Any] | None:
    """Return the newest time and a digest of what the default store holds of a run; None of another store's.

    SQLite has no checksums: a flipped bit in a value is another value. Read without MLflow, which takes seconds.

    Args:
        run_id: The run.
        until: The newest time that counts, in ms: metrics that a user adds later are no damage.
    """
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return None
    file = (history_root() / DATABASE).absolute()
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
        asked = {"run": run_id, "until": until or 2**62}
        rows = [database.execute(query, asked).fetchall() for query in _STORED]
        return {
            "until": max((row[2] for row in rows[0]), default=0),
            "digest": hashlib.sha256(json.dumps(rows, default=repr).encode()).hexdigest(),
        }
    return {}


_STORED = (
    "SELECT key, value, timestamp, step, is_nan FROM metrics WHERE run_uuid = :run AND timestamp <= :until "
    "ORDER BY key, step, timestamp, value",
    # what the pages show: a copy of one of those points
    "SELECT key FROM latest_metrics AS latest WHERE run_uuid = :run AND NOT EXISTS (SELECT 1 FROM metrics WHERE "
    "metrics.run_uuid = latest.run_uuid AND metrics.key = latest.key AND metrics.value = latest.value AND "
    "metrics.step = latest.step AND metrics.timestamp = latest.timestamp) ORDER BY key",
    "SELECT key, value FROM params WHERE run_uuid = :run ORDER BY key",
    "SELECT value FROM tags WHERE run_uuid = :run AND key = 'nirvana.experiment_digest'",
)


def store_fault() -> str | None:
    """Return why the store cannot be used, and what to do, or None; takes seconds where MLflow would take minutes."""
    uri = tracking_uri()
    scheme, _, rest = uri.partition("://")
    if scheme == "sqlite":
        file = Path(rest.removeprefix("/").partition("?")[0])
        fault = database_fault(file, tables=("experiments", "runs", "alembic_version"))
        return fault and (
            f"{_STORE_FAULT}'s database {_shown(file)}: expected one that can be written to, got: {fault}; move it "
            f"aside (mv {_shown(file)} {_shown(file)}.damaged), the next run makes a new one and records there"
        )
    address = urlsplit(uri)
    try:
        host, port = address.hostname, address.port or _PORTS.get(re.split(r"\+", scheme)[0])
    except ValueError:
        return (
            f"{_STORE_FAULT} at {public_uri()}: expected an address whose port is a number; correct MLFLOW_TRACKING_URI"
        )
    if not host or not port or _by_proxy(scheme, host):
        return None
    try:
        with socket.create_connection((host, port), timeout=ANSWER_SECONDS):
            return None
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return (
            f"{_STORE_FAULT} at {public_uri()}: expected a store that takes this run, got {redact(why)}; start it, or "
            "check or unset MLFLOW_TRACKING_URI"
        )


def _by_proxy(scheme: str, host: str) -> bool:
    return scheme in getproxies() and not proxy_bypass(host)


def _shown(file: Path) -> str:
    root = history_root()
    return str(file.relative_to(root)) if file.is_relative_to(root) else str(file)


@contextmanager
def open_store() -> Iterator[tuple["MlflowClient", str]]:
    """Yield a client and the id of our experiment; one process at a time for the default store.

    Raises:
        InputError: If the store does not answer, or its database is damaged.
    """
    keep_loopback_direct()
    if fault := store_fault():
        raise InputError(fault)
    for variable, value in _PATIENCE.items():  # read when MLflow is imported
        os.environ.setdefault(variable, value)
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
            raise InputError(_explained(error.message)) from error
        except Exception as error:  # sqlalchemy's and alembic's own, where a database is another program's or version's
            if type(error).__module__.partition(".")[0] not in _STORE_LIBRARIES:
                raise
            raise InputError(_explained(f"{type(error).__name__}: {error}")) from error


def _explained(answer: str) -> str:
    said = redact(" ".join(answer.split()))[:200]
    if os.environ.get("MLFLOW_TRACKING_URI"):
        remedy = "check MLFLOW_TRACKING_URI or unset it"
    else:
        remedy = f"move it aside (mv {DATABASE} {DATABASE}.other), the next run makes a new one and records there"
    return f"{_STORE_FAULT} at {public_uri()}: expected a store that takes this run, got {said!r}; {remedy}"


def _experiment_id(client: "MlflowClient", root: Path) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    found = client.get_experiment_by_name(name)
    if found:
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return found.experiment_id
    local = not os.environ.get("MLFLOW_TRACKING_URI")
    return client.create_experiment(name, artifact_location=(root / ARTIFACTS).as_uri() if local else None)
