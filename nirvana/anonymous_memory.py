"""Memory that a process really occupies: anonymous and shared pages, not the file pages that the kernel may drop."""

import os
import threading
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int:
    """Return RssAnon + RssShmem of this process; 0 where the system does not tell (not Linux)."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    sizes = [line.split() for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
    return sum(int(size) * 1024 for _, size, _ in sizes)


def available_bytes() -> int:
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
