"""A Dask client: to a cluster of this machine that lives as long as the step, or to a scheduler that is there."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
from distributed import Client, Nanny, Scheduler, SpecCluster
from distributed.security import Security

from nirvana.errors import InputError

CONNECT_SECONDS = 15
_SCRATCH = Path(".cache/dask")
_HOST = "127.0.0.1"

_LOCAL_SETTINGS: dict[str, Any] = {
    # in place of what Dask would set: numbers of threads, which are fixed in the workers as everywhere
    "distributed.nanny.pre-spawn-environ": {"DASK_LOGGING__DISTRIBUTED": "error"},
    # no pages, no sampling of stacks, no giving up a worker whose thread is busy for minutes
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
    "distributed.worker.profile.enabled": False,
    "distributed.scheduler.worker-ttl": None,
    # a job waits at the scheduler, not behind another one that may kill its worker
    "distributed.scheduler.worker-saturation": 1.0,
}


@contextmanager
def connected(workers: int, scheduler: str | None) -> Iterator[Client]:
    """Yield a client of `scheduler`, or of `workers` processes of one thread each that end with the block."""
    logging.getLogger("distributed").setLevel(logging.ERROR)
    logging.getLogger("distributed.nanny").setLevel(logging.WARNING)  # says when it replaces a worker
    if scheduler:
        with _client(scheduler) as client:
            yield client
        return
    with dask.config.set(_LOCAL_SETTINGS), _local_cluster(workers) as cluster, Client(cluster) as client:
        yield client


def _client(scheduler: str) -> Client:
    try:
        return Client(scheduler, timeout=CONNECT_SECONDS)
    except (OSError, TimeoutError, ValueError, TypeError) as error:
        raise InputError(
            f"runtime.scheduler: expected a Dask scheduler at {scheduler}, got no answer within {CONNECT_SECONDS} s "
            f"({type(error).__name__}); start one (docs/team.md) or set it to null"
        ) from error


def _local_cluster(workers: int) -> SpecCluster:
    # LocalCluster would open a page; and whoever reaches a scheduler runs code in its workers: hence TLS, which
    # keeps out the other users of this machine
    shared = {
        "host": _HOST,
        "protocol": "tls://",
        "security": Security.temporary(),
        "dashboard": False,
        "dashboard_address": f"{_HOST}:0",
    }
    worker = {
        "nthreads": 1,
        "memory_limit": 0,
        "local_directory": str(_SCRATCH.absolute()),
    }
    return SpecCluster(
        scheduler={"cls": Scheduler, "options": shared | {"port": 0, "allowed_failures": 1}},
        workers={slot: {"cls": Nanny, "options": shared | worker} for slot in range(workers)},
        security=shared["security"],
    )
