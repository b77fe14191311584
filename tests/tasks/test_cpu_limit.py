"""Work that may never end is bounded, other work is left alone."""

import signal
import threading
import time

import pytest

from nirvana.errors import InputError
from tasks import fetch_corpus
from tasks.corpus.documents import Document
from tasks.workers.cpu_limit import cpu_limit


def test_an_expression_that_never_ends_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_corpus, "_STRIP_SECONDS", 0.5)
    start = time.process_time()
    with pytest.raises(
        InputError, match=r"corpus\.strip: expected an expression .* is not with book; write it without"
    ):
        fetch_corpus._stripped(Document("book", "a" * 40 + "!"), "(a+)+$")
    assert time.process_time() - start < 5
    assert fetch_corpus._stripped(Document("book", "We the people [Laughter] ."), r"\[[^\]]*\]") == "We the people ."
    assert fetch_corpus._stripped(Document("book", " a "), None) == "a"


def test_time_that_is_not_used_up_leaves_no_timer() -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    with cpu_limit(5, "x"):
        pass
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0) and signal.getsignal(signal.SIGVTALRM) is before


def test_another_thread_works_unbounded() -> None:
    done = []

    def work() -> None:
        with cpu_limit(0.001, "x"):
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
