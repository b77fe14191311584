"""A bound on what one piece of work may compute, for work that may never end."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from nirvana.errors import InputError


@contextmanager
def cpu_limit(seconds: float, message: str) -> Iterator[None]:
    """Allow so many seconds of this process's CPU; Python's `re` looks for signals while it works.

    Outside the main thread, which alone may handle signals, nothing is bounded.

    Raises:
        InputError: With the message, if it takes longer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise InputError(message)

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
