"""The pages and the schedule: on loopback only, and nothing listens or writes after their end, however it came."""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest
from toy import command, environment, toy_checkout
from toy_flows import wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkout(tmp_path_factory.mktemp("pages"))


@contextmanager
def started(path: Path, *arguments: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Run a module of ours in the background; at the end, kill all that it started."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", *arguments],
        cwd=path,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        for left in [*family(path), process]:
            left.kill()
        process.communicate(timeout=30)


def family(path: Path) -> list[psutil.Process]:
    """Return what runs in the checkout: children inherit the working directory, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(path) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def announced(process: subprocess.Popen[str]) -> list[str]:
    """Return the lines that `flows.server` prints before it serves."""
    said = []
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        if "Ctrl-C" in line:
            break
    return said


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_pages_answer_on_loopback_and_end_with_their_process(checkout: Path, number: signal.Signals) -> None:
    prefect, mlflow = free_ports(2)
    arguments = ("flows.server", "--prefect-port", str(prefect), "--mlflow-port", str(mlflow))
    with started(checkout, *arguments) as process:
        said = announced(process)
        assert f"Prefect  http://127.0.0.1:{prefect}\n" in said, said
        assert f"MLflow   http://127.0.0.1:{mlflow}\n" in said, said
        for port, title in ((prefect, b"Prefect"), (mlflow, b"MLflow")):
            with urlopen(f"http://127.0.0.1:{port}/", timeout=10) as page:
                assert title in page.read()
        listening = [
            connection.laddr
            for member in family(checkout)
            for connection in member.net_connections()
            if connection.status == psutil.CONN_LISTEN
        ]
        assert {prefect, mlflow} <= {port for _, port in listening}
        assert {host for host, _ in listening} == {"127.0.0.1"}
        process.send_signal(number)
        process.wait(25)
        wait_for(lambda: not family(checkout), 5)
        assert is_free(prefect)
        assert is_free(mlflow)
    if number == signal.SIGTERM:
        assert process.returncode == 0


def test_a_killed_flow_takes_its_temporary_server_along(checkout: Path) -> None:
    with started(checkout, "flows.pipeline", TOY_SLEEPS="fetch_model") as process:
        wait_for((checkout / ".cache/asleep").exists, 90)
        commands = [" ".join(member.cmdline()) for member in family(checkout)]
        assert any("uvicorn" in each for each in commands), commands
        process.kill()
        wait_for(lambda: not family(checkout), 5)


def test_a_wrong_schedule_is_told_in_one_line(checkout: Path) -> None:
    done = command(checkout, sys.executable, "-m", "flows.serve", "--cron", "nonsense", check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: --cron, --timezone: expected five fields")
    assert done.stderr.count("\n") == 1


def test_a_team_server_is_named_without_its_password(checkout: Path) -> None:
    url = "https://user:secret@prefect.example.org/api"
    with started(checkout, "flows.server", PREFECT_API_URL=url, MLFLOW_TRACKING_URI="http://mlflow") as process:
        said = announced(process)
    assert "Prefect  https://prefect.example.org (PREFECT_API_URL)\n" in said
    assert "secret" not in "".join(said)
