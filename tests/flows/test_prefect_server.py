"""Prefect shows steps, they do not need it: down, damaged or behind a dead proxy, they run, and one line says so."""

import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from toy import command, environment, runs, set_param

from flows import prefect_server
from flows.prefect_server import _last_line

SECRET = "s3cretWord"  # hidden wherever it is written


@pytest.fixture(scope="module")
def checkout(finished_toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy checkout whose flow ran once, with a server of its own: there is a real prefect.db."""
    path = tmp_path_factory.mktemp("copy") / "checkout"
    command(path.parent, "cp", "-a", str(finished_toy), str(path))
    return path


def flow(path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return command(path, sys.executable, "-m", "flows.pipeline", check=False, **variables)


def lines(done: subprocess.CompletedProcess[str], start: str) -> list[str]:
    assert "Traceback" not in done.stderr and "╭" not in done.stderr, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith(start)]


def damage_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 // 4096 * 4096 + 100])


def damage_text(file: Path) -> None:
    file.write_text("not a database\n" * 1000)


def damage_foreign(file: Path) -> None:
    file.unlink()
    with sqlite3.connect(file) as database:
        database.execute("CREATE TABLE songs (name TEXT)")


def damage_version(file: Path) -> None:
    with sqlite3.connect(file) as database:
        database.execute("UPDATE alembic_version SET version_num = 'feedfacecafe'")


@pytest.mark.slow
@pytest.mark.parametrize("damage", [damage_half, damage_text, damage_foreign, damage_version])
def test_a_database_that_cannot_be_used_stops_no_step(checkout: Path, tmp_path: Path, damage) -> None:
    path = tmp_path / "checkout"
    command(tmp_path, "cp", "-a", str(checkout), str(path))
    home = path / ".prefect"
    for left in home.glob("prefect.db-*"):
        left.unlink()
    damage(home / "prefect.db")
    set_param(path, "pruning_ratio: 0.2 ", "pruning_ratio: 0.4 ")
    done = flow(path)
    (warning,) = lines(done, "warning: Prefect")
    assert "Prefect's database .prefect/prefect.db: expected one that it can write to, got: " in warning
    assert warning.endswith("the steps run without it")
    assert done.returncode == 0 and "prune" in runs(path)
    # the remedy works
    command(path, *re.search(r"\((mv [^)]*)\)", warning)[1].split())
    done = flow(path, PREFECT_LOGGING_LEVEL="INFO")
    assert done.returncode == 0 and lines(done, "warning: ") == [] and (home / "prefect.db").exists()


@pytest.mark.slow
def test_a_server_that_is_down_costs_seconds_and_its_password_is_hidden(checkout: Path) -> None:
    start = time.monotonic()
    url = f"http://ann:{SECRET}@127.0.0.1:9/api"
    done = flow(checkout, PREFECT_API_URL=url, MLFLOW_TRACKING_URI=f"http://ann:x/{SECRET}@127.0.0.1:9")
    assert time.monotonic() - start < 90
    first, second = lines(done, "warning: ")
    assert first == (
        "warning: Prefect at http://***@127.0.0.1:9/api: expected a server that answers, got Connection refused; start "
        "it, or correct or unset PREFECT_API_URL; the steps run without it"
    )
    # nor does MLflow take the results away
    assert second.startswith(
        "warning: not recorded: MLflow at http://127.0.0.1:9: expected a store that takes this run"
    )
    assert second.endswith("results stand, the next run records them")
    assert done.returncode == 0 and lines(done, "error: ") == []
    assert SECRET not in done.stdout + done.stderr
    assert [file for file in checkout.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()] == []
    # recorded later
    (checkout / "reports/mlflow_run.json").unlink()
    done = flow(checkout, PREFECT_API_URL="http://127.0.0.1:9/api")
    assert done.returncode == 0 and (checkout / "reports/mlflow_run.json").exists()


@pytest.mark.slow
def test_a_proxy_is_not_asked_for_servers_of_this_machine(checkout: Path) -> None:
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY"), "http://127.0.0.1:9")
    start = time.monotonic()
    done = flow(checkout, **proxies)
    assert time.monotonic() - start < 90
    assert done.returncode == 0 and lines(done, "warning: ") == [] and "Flow run" in done.stderr


def test_what_a_server_answers_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/api"
        answers = iter([b"200 OK", b"401 Unauthorized", b"503 Unavailable"])

        def serve() -> None:
            for answer in answers:
                connection, _ = server.accept()
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 " + answer + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                connection.close()

        threading.Thread(target=serve, daemon=True).start()
        assert [prefect_server._silence(url) for _ in range(3)] == [None, None, "status 503"]
        monkeypatch.setattr(prefect_server, "ANSWER_SECONDS", 0.3)
        assert "no answer" in (prefect_server._silence(url) or "") or "timed out" in (
            prefect_server._silence(url) or ""
        )
    assert prefect_server._silence(url) == "Connection refused"
    for odd in ("nonsense", "http://", "http://[", "http://a:b:c/", "ftp://host/", "http://host:99999/"):
        assert prefect_server._silence(odd), odd


def test_a_setting_that_prefect_refuses_is_told() -> None:
    """Prefect says it in its own words too."""
    done = command(Path.cwd(), sys.executable, "-m", "flows.pipeline", check=False, PREFECT_LOGGING_LEVEL="nonsense")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: expected PREFECT_... variables and settings that Prefect takes, got level; Input")


def test_a_database_elsewhere_is_looked_for_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, url, file in (
        ("PREFECT_API_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{tmp_path}/x.db", tmp_path / "x.db"),
        ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "postgresql+asyncpg://a:b@host/db", None),
        ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "sqlite+aiosqlite:///:memory:", None),
    ):
        monkeypatch.setenv(variable, url)
        assert prefect_server.database_file() == file


def test_the_cause_is_found_in_a_framed_traceback(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "╭─ Traceback ─╮\n│ /x/y.py:3 │\n╰──╯\nOperationalError: (sqlite3) disk I/O error\n\nApplication failed.\n"
    )
    assert _last_line(log) == "OperationalError: (sqlite3) disk I/O error"
    assert _last_line(tmp_path / "none") == ""


def test_environment_excepts_loopback_for_children() -> None:
    import os

    import flows.environment  # noqa: F401

    assert {"127.0.0.1", "localhost", "::1"} <= set(os.environ["NO_PROXY"].split(","))
    assert shutil.which("python") and environment()["NO_PROXY"] == os.environ["NO_PROXY"]
