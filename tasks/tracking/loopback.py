"""Servers of this machine are asked directly, whatever proxy the environment names."""

import os

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def keep_loopback_direct() -> None:
    """Except loopback from every proxy, in the two spellings that libraries read; what the user excepts stays."""
    given = ",".join(os.environ[name] for name in ("no_proxy", "NO_PROXY") if os.environ.get(name))
    excepted = list(dict.fromkeys(part.strip() for part in given.split(",") if part.strip()))
    direct = [*excepted, *(host for host in LOOPBACK if host not in excepted)]
    # `*` is no proxy at all; in a list with others it is a mere name to some readers
    value = "*" if "*" in excepted else ",".join(direct)
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = value
