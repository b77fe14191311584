"""What the tests of the flows share: one Prefect server, and checkouts in which everything ran once.

A checkout is made by the first test process that asks for it, for all of them: nobody changes it, tests work on copies.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from filelock import FileLock
from toy import command, commit, environment, runs, toy_checkout
from toy_flows import wait_for

from benchmarks.reliability.checkout import finish, make_checkout
from tasks.registry import STEPS


def once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], None]) -> Path:
    """Return a directory that `build` fills, once for all test processes of a run."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    path, done = root / f"shared-{name}", root / f"shared-{name}.done"
    with FileLock(root / f"shared-{name}.lock"):
        if not done.exists():
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
            build(path)
            done.touch()
    return path


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Prefect server for all tests of a process: each flow's own would take ten seconds to start."""
    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    variables = environment(PREFECT_HOME=str(home), PREFECT_API_URL=url, PREFECT_SERVER_ANALYTICS_ENABLED="false")
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        env=variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(lambda: answers(f"{url}/health"), 120)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.fixture(scope="session")
def finished_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy checkout in which the flow ran once, from nothing, beside a Prefect server of its own."""

    def build(path: Path) -> None:
        toy_checkout(path)
        done = command(path, sys.executable, "-m", "flows.pipeline")
        assert runs(path) == [step.name for step in STEPS if step.name != "record"]
        assert "15 of 15 steps ran" in done.stdout
        commit(path, "ran")

    return once(tmp_path_factory, "toy", build)


@pytest.fixture
def checkout(finished_toy: Path, tmp_path: Path) -> Path:
    """A copy of the finished toy checkout, with links and cache as they were."""
    path = tmp_path / "checkout"
    command(tmp_path, "cp", "-a", str(finished_toy), str(path))
    return path


@pytest.fixture(scope="session")
def finished_real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of the real steps in which all of them ran once; `model` and `corpus` lie beside it."""

    def build(path: Path) -> None:
        status, said = finish(make_checkout(path))
        assert status == 0, said

    return once(tmp_path_factory, "real", build) / "checkout"


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
