"""300 mutated inputs give one line or a usable result; benchmarks/reliability/mutations.py tries as many as asked."""

import random

import pytest

from benchmarks.reliability.mutations import SHARES, Tally, attempt, mangled, mutated, try_all
from nirvana.errors import InputError


def test_mutated_inputs_give_one_line_or_a_result() -> None:
    tallies = try_all(300)
    bad = [line for tally in tallies.values() for line in [*tally.tracebacks, *tally.hangs]]
    assert not bad, bad[0]
    assert set(tallies) == set(SHARES) and sum(tally.tried for tally in tallies.values()) >= 295
    # neither all refused, which would test nothing behind the first check, nor all taken
    taken = sum(tally.taken for tally in tallies.values())
    assert 10 < taken < 290


def test_what_goes_wrong_is_noticed() -> None:
    def fails(error: BaseException):
        def read(chance: random.Random) -> None:
            raise error

        return read

    class Panic(BaseException):
        pass

    for error, noticed in ((InputError("one line"), 0), (InputError(""), 1), (KeyError("x"), 1), (Panic(), 1)):
        tally = Tally()
        attempt(fails(error), "kind", tally, 1)
        assert (len(tally.tracebacks), tally.taken, tally.tried) == (noticed, 0, 1)


def test_a_hang_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.reliability.mutations.CPU_SECONDS", 0.2)

    def endless(chance: random.Random) -> None:
        while True:
            chance.random()

    tally = Tally()
    attempt(endless, "kind", tally, 7)
    assert tally.hangs == ["kind 7"]


def test_the_same_seed_makes_the_same_input() -> None:
    value = {"a": [1, {"b": "text"}], "c": None}
    for seed in range(20):
        first, second = (mutated(value, random.Random(seed)) for _ in range(2))
        assert repr(first) == repr(second)
        assert mangled(b"some bytes", random.Random(seed)) == mangled(b"some bytes", random.Random(seed))
    assert value == {"a": [1, {"b": "text"}], "c": None}
