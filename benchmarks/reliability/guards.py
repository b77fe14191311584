"""What the guards add to a run of which nothing changed: `python -m benchmarks.reliability.guards`.

The flow is run on this checkout, alternately with the guards and without them, each in a process of its own, after one
run that brings everything up to date and verifies it. Guards are: outputs held against dvc.lock, own files mended, the
early check, the look at Prefect's database.
"""

import argparse
import statistics
import subprocess
import sys
import time

ROUNDS = 5
MOST_SECONDS, MOST_SHARE = 3.0, 0.03


def main() -> int:
    """Print each round and the medians; 0 if both are within their limits, 3 if not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--child", choices=("with", "without"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        return _run_flow(guarded=asked.child == "with")
    _timed("with")
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for number in range(asked.rounds):
        for way in ("with", "without") if number % 2 else ("without", "with"):
            seconds[way].append(_timed(way))
        print(f"round {number + 1}: {seconds['with'][-1]:.2f} s with, {seconds['without'][-1]:.2f} s without")
    guarded, bare = (statistics.median(seconds[way]) for way in ("with", "without"))
    added = statistics.median(a - b for a, b in zip(seconds["with"], seconds["without"], strict=True))
    print(f"median {guarded:.2f} s with, {bare:.2f} s without; paired difference {added:+.2f} s, {added / bare:+.1%}")
    return 0 if added <= MOST_SECONDS and added <= MOST_SHARE * bare else 3


def _timed(way: str) -> float:
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.reliability.guards", "--child", way]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - start


def _run_flow(guarded: bool) -> int:
    from flows import own_files, pipeline, verify  # noqa: TID251 - it measures them

    if not guarded:
        verify.give_copies = lambda name, logger: None
        verify.changed_in_place = lambda name: []
        verify.prepare_cache = lambda name, say: None
        verify.drop_damaged_outputs = lambda name, say: False
        own_files.mend_own_files = lambda say: False
        pipeline.fault_known_early = lambda logger: None
        pipeline.prefect_fault = lambda: None
    pipeline.main(until=None, wait_minutes=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
