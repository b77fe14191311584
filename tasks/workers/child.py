"""What a process owes the one that started it: to die with it, and to compute as it does.

Apart from process.py because steps that fan out depend on this file: an edit there must not rerun a model.
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
    """Make torch use `threads` threads an operation, deterministic algorithms and float32 throughout.

    Call before the first CUDA matrix product: cuBLAS reads its setting then.
    """
    # fixed workspaces; without them torch refuses matrix products under deterministic algorithms
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    torch.set_num_threads(threads)
    # index_add_, index_copy_ and attention's backward add in any order on CUDA otherwise
    torch.use_deterministic_algorithms(True)
    # no TF32, which keeps 10 of 23 bits; an environment variable may have allowed it
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False


def use_device(device: str) -> None:
    """Make a numbered GPU the one that `cuda` means in this process, so that nothing lands on the first by default."""
    import torch

    chosen = torch.device(device)
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)
