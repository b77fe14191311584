"""What a process owes the one that started it: to die with it, and to compute as it does.

Apart from tasks/process.py because steps that fan out depend on this file: an edit there must not rerun a model.
"""

import ctypes
import os
import signal
from contextlib import suppress

DRIVER_PID = "NIRVANA_DRIVER_PID"  # set by the flow: whose child a step must be, and who prints its log

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent dies; leave at once if it already did.

    A step that outlives its driver would write into a workspace that DVC has already unlocked.

    Args:
        parent: Process id of the parent; the flow's if it said so, else whoever is the parent now.
    """
    expected = parent or int(os.environ.get(DRIVER_PID, os.getppid()))
    with suppress(OSError, AttributeError):  # not Linux: the driver's own signal handling has to do
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != expected:
        raise SystemExit("the process that started this step is gone")


def fix_torch(threads: int) -> None:
    """Make torch use `threads` threads an operation and deterministic algorithms."""
    import torch

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
