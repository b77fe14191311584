"""Results as lines of JSON, one a case, written as soon as it is known: a stopped run goes on where it was."""

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.reliability.checkout import code_digest


class Results:
    """The lines of one script, the last of each case counting.

    Args:
        file: Where they are.
        afresh: Forget them first.
    """

    def __init__(self, file: Path, afresh: bool = False):
        self._file = file
        if afresh:
            file.unlink(missing_ok=True)
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self._last = {line["case"]: line for line in map(json.loads, lines)}
        self._started = time.monotonic()

    def is_known(self, case: str) -> bool:
        """Tell whether a case went well, or was tried with this very code."""
        line = self._last.get(case)
        return line is not None and (line["passed"] or line["code"] == code_digest())

    def start(self) -> None:
        """Start the clock of a case."""
        self._started = time.monotonic()

    def add(self, case: str, passed: bool, outcome: str, shared: int = 1) -> None:
        """Keep and print what became of a case, which may have shared its run with others."""
        seconds = round(time.monotonic() - self._started, 1)
        line = {"case": case, "passed": passed, "outcome": outcome, "seconds": seconds, "code": code_digest()}
        line |= {"shared": shared} if shared > 1 else {}
        self._last[case] = line
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        sys.stdout.write(f"{case:64s} {outcome} ({seconds:.0f} s)\n")
        sys.stdout.flush()

    def close(self, cases: Iterable[str]) -> int:
        """Print how many of these cases passed, and those that did not; return the exit status."""
        names = list(cases)
        passed = [name for name in names if name in self._last and self._last[name]["passed"]]
        for name in names:
            if name in self._last and name not in passed:
                sys.stdout.write(f"NOT PASSED: {name}: {self._last[name]['outcome']}\n")
        sys.stdout.write(f"{len(passed)} of {len(names)}; lines in {self._file}\n")
        return 0 if len(passed) == len(names) else 1


def chosen(names: list[str], only: str | None, start: str | None) -> list[str]:
    """Return the cases whose names hold one of the words of `only`, from the first that holds `start`."""
    if start:
        names = names[next((number for number, name in enumerate(names) if start in name), len(names)) :]
    words = only.split(",") if only else [""]
    return [name for name in names if any(word in name for word in words)]
