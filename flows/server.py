"""The Prefect and MLflow pages, on loopback, until Ctrl-C: `python -m flows.server`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Annotated
from urllib.error import URLError
from urllib.request import urlopen

import flows.environment as environment  # before prefect, which reads it when imported

# isort: split
import typer

from flows.kill_with_parent import kill_with_parent
from flows.prefect_server import database_problem
from nirvana.errors import InputError
from tasks.tracking.mlflow_store import store_fault, tracking_uri, without_credentials
from tasks.workers.process import ERROR_PREFIX

HOST = "127.0.0.1"
PREFECT_PORT = 4200
MLFLOW_PORT = 5000
READY_SECONDS = 300


def page(api: str) -> str:
    """Return the address of the page that belongs to a Prefect API, without credentials."""
    return without_credentials(api).removesuffix("/api")


@contextmanager
def prefect_server(port: int) -> Iterator[str]:
    """Run a Prefect server on the checkout's history; yield its API's URL."""
    url = f"http://{HOST}:{port}"
    variables = {"PREFECT_API_URL": f"{url}/api", "PREFECT_UI_API_URL": f"{url}/api"}
    command = ["prefect", "server", "start", "--host", HOST, "--port", str(port)]
    if fault := database_problem():
        raise InputError(fault)
    with _server("Prefect", command, port, f"{url}/api/health", variables):
        said = environment.ui_file()
        said.parent.mkdir(parents=True, exist_ok=True)
        # a run started meanwhile reports to this server
        with suppress(OSError):  # then it is only not found by itself
            said.write_text(json.dumps({"pid": os.getpid(), "api": f"{url}/api"}), encoding="utf-8")
        try:
            yield f"{url}/api"
        finally:
            said.unlink(missing_ok=True)


@contextmanager
def mlflow_server(port: int) -> Iterator[str]:
    """Run an MLflow server on the checkout's history; yield its URL."""
    url = f"http://{HOST}:{port}"
    command = ["mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    if fault := store_fault():
        raise InputError(fault)
    # in the environment, not on the command line: the process list must not show a password
    variables = {"MLFLOW_BACKEND_STORE_URI": tracking_uri()}
    with _server("MLflow", command, port, f"{url}/health", variables):
        yield url


@contextmanager
def _server(name: str, arguments: list[str], port: int, health: str, variables: dict[str, str]) -> Iterator[None]:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise InputError(
                f"{name}: expected port {port} to be free, another program listens there; stop it or choose another "
                f"port (make ui {name.upper()}_PORT={port + 1})"
            ) from None
    log = environment.ROOT / ".cache" / f"{name.lower()}_server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=environment.ROOT,
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the servers have children of their own: stop the group
        )
        kill_with_parent(process.pid)
        try:
            _wait_until_ready(name, process, health)
            yield
        finally:
            _stop(process)


def _wait_until_ready(name: str, process: "subprocess.Popen[bytes]", health: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with suppress(URLError, OSError), urlopen(health, timeout=5) as answer:  # noqa: S310 (a loopback URL)
            if answer.status == 200:
                return
        time.sleep(0.5)
    raise InputError(
        f"{name}: expected its server to answer within {READY_SECONDS} s, it did not; "
        f".cache/{name.lower()}_server.log says why"
    )


def _stop(process: "subprocess.Popen[bytes]") -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
            if number == signal.SIGTERM:
                continue  # the group's leader has gone; its children get the second signal
            return


def main(
    prefect_port: Annotated[int, typer.Option(help="Port of the Prefect page.")] = PREFECT_PORT,
    mlflow_port: Annotated[int, typer.Option(help="Port of the MLflow page.")] = MLFLOW_PORT,
) -> None:
    """Serve both pages until Ctrl-C; a team's server, where one is configured, is only named."""
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    team_mlflow = os.environ.get("MLFLOW_TRACKING_URI", "").startswith(("http://", "https://"))
    try:
        with ExitStack() as servers:
            typer.echo("starting the Prefect and MLflow pages, about half a minute ...")
            if "PREFECT_API_URL" in os.environ:
                typer.echo(f"Prefect  {page(os.environ['PREFECT_API_URL'])} (PREFECT_API_URL)")
            else:
                api = servers.enter_context(prefect_server(prefect_port))
                typer.echo(f"Prefect  {page(api)}")
            if team_mlflow:
                typer.echo("MLflow   where MLFLOW_TRACKING_URI points")
            else:
                typer.echo(f"MLflow   {servers.enter_context(mlflow_server(mlflow_port))}")
            typer.echo("Ctrl-C stops both")
            while True:
                signal.pause()
    except InputError as error:
        sys.stderr.write(f"{ERROR_PREFIX}{error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("stopped")


if __name__ == "__main__":
    typer.run(main)
