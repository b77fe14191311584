"""A server ends with the process that started it, even if that one is killed.

The kernel's death signal would not reach the server's own children, nor work outside Linux. So a small process
reads a pipe that only the parent has open for writing; when it ends, the parent has gone.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

import psutil

_GRACE_SECONDS = 2
_watchers: list["subprocess.Popen[bytes]"] = []  # keeps the pipes open


def kill_with_parent(pid: int) -> None:
    """Stop the process `pid` and its descendants once this process has ended, however it did."""
    command = [sys.executable, __file__, str(pid)]
    quiet = subprocess.DEVNULL
    # a session of its own: what is sent to the parent's group must not end it
    _watchers.append(
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True)
    )


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
