"""Whether Prefect can show a run, found in seconds. It shows steps, it does not need to be there for them."""

import atexit
import os
import re
import socket
import sqlite3
import ssl
import subprocess
import sys
import time
from contextlib import ExitStack, closing, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import flows.environment as environment  # before prefect, which reads it when imported

# isort: split
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, get_current_settings, temporary_settings

from flows.kill_with_parent import kill_with_parent
from tasks.tracking.redaction import redact, redact_logs
from tasks.tracking.sqlite_file import database_fault

ANSWER_SECONDS = 10
TEMPORARY_SERVER_LOG = Path(".cache/prefect_temporary_server.log")
"""Relative to the checkout, where every flow works."""
_HOST, _START_SECONDS = "127.0.0.1", 120
_TEMPORARY = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
"""Only the services that a flow needs: without them Prefect schedules, cleans and serves pages too."""
_settings = ExitStack()  # the temporary server's address holds as long as this process
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
    """Start a temporary server, which this process then speaks to; return what kept it from starting.

    Prefect has one of its own, but stops it at a regular exit only, and starts it anew without end where its database
    cannot be opened. This is the same program, in a process of ours.
    """
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
    command += ["--host", _HOST, "--port", str(port), "--log-level", "error", "--lifespan", "on"]
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    log = TEMPORARY_SERVER_LOG
    with ExitStack() as files:
        said: Any = None
        with suppress(OSError):  # a full disk: then it goes where ours does
            TEMPORARY_SERVER_LOG.parent.mkdir(parents=True, exist_ok=True)
            said = files.enter_context(TEMPORARY_SERVER_LOG.open("wb"))
        process = subprocess.Popen(command, env=os.environ | _TEMPORARY | settings, stderr=said)
    kill_with_parent(process.pid)
    atexit.register(_stop, process)
    url = f"http://{_HOST}:{port}/api"
    deadline = time.monotonic() + _START_SECONDS
    while _silence(url) is not None:
        if process.poll() is not None:
            cause = redact(_last_line(TEMPORARY_SERVER_LOG) or f"exit status {process.returncode}")
            return (
                f"Prefect's temporary server: expected it to start, it ended with {cause} ({log} has more); free disk "
                f"space, or move {_shown_home()} aside for the next run"
            )
        if time.monotonic() > deadline:
            return (
                f"Prefect's temporary server: expected it to answer in {_START_SECONDS} s, it did not; {log} has more"
            )
        time.sleep(0.1)
    # no address of a page: this server has none
    _settings.enter_context(temporary_settings({PREFECT_API_URL: url, PREFECT_UI_URL: ""}))
    return None


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)


def _last_line(log: Path) -> str:
    with suppress(OSError):
        lines = [line.strip(" \t│╭╰─╮╯") for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
        errors = [line for line in lines if re.match(r"^[\w.]+(Error|Exception|Warning)?: ", line)]
        return ([line for line in errors if "Error" in line] or errors or [line for line in lines if line] or [""])[-1][
            :200
        ]
    return ""


def _shown_home() -> str:
    home = Path(get_current_settings().home)
    return str(home.relative_to(environment.ROOT) if home.is_relative_to(environment.ROOT) else home)
