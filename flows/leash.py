"""A server ends with the process that started it, even if that one is killed: `hold(pid)`.

The kernel's death signal would not reach the server's own children, nor work outside Linux. So a small process
reads a pipe that only the holder has open for writing; when it ends, the holder has gone.
"""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

TEMPORARY_SERVER_LOG = Path(".cache/prefect_temporary_server.log")
"""Relative to the checkout, where every flow works."""

_GRACE_SECONDS = 2
_START_SECONDS = 120
_held: list["subprocess.Popen[bytes]"] = []  # keeps the pipes open


def hold(pid: int) -> None:
    """Stop the process `pid` and its descendants once this process has ended, however it did."""
    command = [sys.executable, __file__, str(pid)]
    quiet = subprocess.DEVNULL
    # a session of its own: what is sent to the holder's group must not end it
    _held.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True))


class ServerDiedError(Exception):
    """Prefect's temporary server ended before it answered; the message is the last line that it said."""


def hold_temporary_server() -> None:
    """Have Prefect hold its temporary server, which it stops at a regular exit only, and notice when it dies.

    Prefect takes exit status 3 for a busy port and starts anew, without end: it is also what a database that cannot be
    opened leads to. What the server says goes to a file.
    """
    from prefect.server.api.server import SubprocessASGIServer

    start = SubprocessASGIServer._run_uvicorn_command
    if getattr(start, "holds", False):
        return

    def start_and_hold(self: SubprocessASGIServer) -> "subprocess.Popen[bytes]":
        with _said_to(TEMPORARY_SERVER_LOG):
            process = start(self)
        hold(process.pid)
        _wait_until_listening(process, int(self.port or 0))
        return process

    start_and_hold.holds = True  # type: ignore[attr-defined]
    SubprocessASGIServer._run_uvicorn_command = start_and_hold  # type: ignore[method-assign]


@contextmanager
def _said_to(log: Path) -> Iterator[None]:
    """Have processes that are started meanwhile write their errors to a file."""
    kept = os.dup(2)
    try:
        with suppress(OSError):  # a full disk: then they go where ours do
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("wb") as file:
                os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _wait_until_listening(process: "subprocess.Popen[bytes]", port: int) -> None:
    """Return when the server accepts connections, or Prefect's own patience begins.

    Raises:
        ServerDiedError: If it ended.
    """
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerDiedError(_last_line(TEMPORARY_SERVER_LOG) or f"exit status {process.returncode}")
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)


def _last_line(log: Path) -> str:
    with suppress(OSError):
        lines = [line.strip(" \t│╭╰─╮╯") for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
        errors = [line for line in lines if re.match(r"^[\w.]+(Error|Exception|Warning)?: ", line)]
        return ([line for line in errors if "Error" in line] or errors or [line for line in lines if line] or [""])[-1][
            :200
        ]
    return ""


def die_with_schedule() -> None:
    """End this process when `flows.serve`, which started it for a scheduled run, is gone; else do nothing."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)  # the running step dies with it

    threading.Thread(target=watch, name="watch flows.serve", daemon=True).start()


def _wait_and_stop(pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        server = psutil.Process(pid)  # remembers when it started: a later process of the same number is another
        sys.stdin.read()
        processes = [server, *server.children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(processes, _GRACE_SECONDS)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


if __name__ == "__main__":
    _wait_and_stop(int(sys.argv[1]))
