"""The device that computes, and what the machine has: memory that is free, memory in use, cores."""

import os
import re
import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from nirvana.errors import InputError

if TYPE_CHECKING:  # a step's process measures its memory before it imports torch
    import torch

_STATUS = Path("/proc/self/status")


def resolve_device(name: str) -> "torch.device":
    """Return the device for `auto`, `cpu` or `cuda`; `auto` takes a GPU where there is one.

    Raises:
        InputError: If `cuda` is asked for and there is none.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("runtime.device: expected a machine with CUDA, found no usable GPU; set it to auto or cpu")
    if re.fullmatch(r"cpu|cuda(:\d{1,3})?", name) is None:
        raise InputError(f"device: expected auto, cpu, cuda or cuda:N, got {name[:40]!r}; correct it")
    return torch.device(name)


def devices(device: "torch.device") -> int:
    """Return over how many devices workers spread: all GPUs, unless the device names one."""
    import torch

    return max(1, torch.cuda.device_count()) if device.type == "cuda" and device.index is None else 1


def most_workers(device: "torch.device") -> int:
    """Return how many processes can compute side by side: one a GPU, or a core that this process may use."""
    return devices(device) if device.type == "cuda" else len(os.sched_getaffinity(0))


def available_bytes(device: "torch.device") -> int:
    """Return the memory that can still be taken on a device; of several GPUs, on the first."""
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _available_here()


def total_bytes(device: "torch.device") -> int:
    """Return the memory that a device has."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _available_here() -> int:
    """Return the memory that can still be allocated here: the machine's, or less where a cgroup is limited."""
    found = []
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []:
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        statistics = dict(line.split() for line in (limit.parent / "memory.stat").read_text().splitlines())
        cached = int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0))
        found.append(int(text) - int(used.read_text()) + cached)
    if not found:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return max(0, min(found))


def process_bytes(*fields: str) -> int:
    """Return the sum of some sizes of this process, named as in /proc/self/status; 0 where there is none."""
    try:
        lines = [line.partition(":") for line in _STATUS.read_text().splitlines()]
    except OSError:
        return 0
    return sum(int(size.split()[0]) * 1024 for field, _, size in lines if field in fields)


def anonymous_bytes() -> int:
    """Return what this process really occupies, without the file pages that the kernel may drop; Linux only."""
    return process_bytes("RssAnon", "RssShmem")


class PeakAnonymous:
    """Sample `anonymous_bytes` in a thread for as long as the `with` block runs; `peak_bytes` is the largest seen."""

    def __init__(self, every_s: float = 0.02):
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)
        self.peak_bytes = 0

    def _sample(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())
            if self._stop.wait(self._every_s):
                return

    def __enter__(self) -> "PeakAnonymous":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
