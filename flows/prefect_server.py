"""Whether Prefect can show a run, found in seconds. It shows steps, it does not need to be there for them."""

import os
import re
import sqlite3
import ssl
from contextlib import closing, suppress
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import flows.environment as environment  # before prefect, which reads it when imported

# isort: split
from prefect.settings import PREFECT_API_URL, get_current_settings

from flows.leash import TEMPORARY_SERVER_LOG, ServerDiedError, hold_temporary_server
from tasks.tracking.redaction import redact, redact_logs
from tasks.tracking.sqlite_file import database_fault

ANSWER_SECONDS = 10
_TABLES = ("alembic_version", "flow_run", "task_run")
_VARIABLES = ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL")


def prefect_fault() -> str | None:
    """Return why Prefect cannot show this run and what to do, in one line, or None; starts its temporary server."""
    redact_logs()
    url = PREFECT_API_URL.value()
    if url:
        fault = _silence(url)
        return fault and (
            f"Prefect at {redact(url)}: expected a server that answers, got {fault}; start it, or correct or unset "
            "PREFECT_API_URL"
        )
    fault = database_problem()
    return fault or _start()


def database_problem() -> str | None:
    """Return what keeps a server of ours from the checkout's history of runs and what to do, in one line, or None."""
    file = database_file()
    if file is None:
        return None
    fault = database_fault(file, _TABLES) or _foreign_version(file)
    if fault is None:
        return None
    shown = file.relative_to(environment.ROOT) if file.is_relative_to(environment.ROOT) else file
    return (
        f"Prefect's database {shown}: expected one that it can write to, got: {fault}; move it aside "
        f"(mv {shown} {shown}.damaged), the next run makes a new one"
    )


def database_file() -> Path | None:
    """Return the SQLite file that a server of ours would use; None where it is another database's server."""
    given = next((os.environ[name] for name in _VARIABLES if os.environ.get(name)), None)
    if given is None:
        return Path(get_current_settings().home) / "prefect.db"
    scheme, _, rest = given.partition("://")
    if not scheme.startswith("sqlite") or ":memory:" in rest:
        return None
    return Path(rest.removeprefix("/").partition("?")[0])


def _foreign_version(file: Path) -> str | None:
    """Return whether a database was left by a version of Prefect that this one does not know."""
    import prefect

    versions = Path(prefect.__file__).parent / "server/database/_migrations/versions/sqlite"
    with suppress(sqlite3.Error, OSError):
        if not file.is_file() or not versions.is_dir():
            return None
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=0)) as database:
            known = [name for (name,) in database.execute("SELECT version_num FROM alembic_version")]
        unknown = [name for name in known if not any(versions.glob(f"*_{re.sub(r'[^0-9a-f]', '?', name)}_*.py"))]
        return f"it is of another version of Prefect ({unknown[0][:40]})" if unknown else None
    return None


def _silence(url: str) -> str | None:
    """Return why a server does not answer; a refusal is an answer, for the client to deal with."""
    try:
        address = urlsplit(url)
        if address.scheme not in ("http", "https") or not address.hostname:
            return "no http address"
        plain = address._replace(netloc=address.netloc.rpartition("@")[2])
        with urlopen(Request(f"{plain.geturl().rstrip('/')}/health"), timeout=ANSWER_SECONDS):  # noqa: S310
            return None
    except HTTPError as error:
        return f"status {error.code}" if error.code >= 500 else None
    except URLError as error:
        if isinstance(error.reason, ssl.SSLError):  # its client may have been told to trust the certificate
            return None
        reason = error.reason
        return redact(str(getattr(reason, "strerror", None) or reason))
    except TimeoutError:
        return f"no answer in {ANSWER_SECONDS} s"
    except (OSError, ValueError, HTTPException) as error:  # no address at all, no HTTP
        return redact(str(error)) or type(error).__name__


def _start() -> str | None:
    """Start the temporary server that the flow will use; return what kept it from starting."""
    from prefect.server.api.server import SubprocessASGIServer

    hold_temporary_server()
    try:
        SubprocessASGIServer().start()
    except ServerDiedError as error:
        return (
            f"Prefect's temporary server: expected it to start, it ended with {redact(str(error))} "
            f"({TEMPORARY_SERVER_LOG} has more); free disk space, or move {_shown_home()} aside for the next run"
        )
    except Exception as error:  # no free port, no answer in time: whatever Prefect raises
        cause = redact(" ".join(str(error).split())[:200])
        return f"Prefect's temporary server: expected it to start, got {cause}; {TEMPORARY_SERVER_LOG} has more"
    return None


def _shown_home() -> str:
    home = Path(get_current_settings().home)
    return str(home.relative_to(environment.ROOT) if home.is_relative_to(environment.ROOT) else home)
