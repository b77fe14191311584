"""Short versions of `make kills` and `make damage`: real steps, killed and damaged, byte for byte."""

import random

import pytest

from benchmarks.reliability import damage, kills
from benchmarks.reliability.checkout import copy_checkout, finish, make_checkout

pytestmark = pytest.mark.slow


def test_a_killed_step_ends_with_the_same_bytes(tmp_path):
    names = ["sample_pool", "collect_gradients"]
    before, seconds, finished = kills.prepare(tmp_path, names)
    generator = random.Random(1)
    for name in names:
        where, outcome = kills.kill_once(before[name], finished, name, seconds[name], generator)
        assert outcome == "equal", (name, where)


def test_what_is_damaged_is_made_again_or_refused(tmp_path):
    finished = make_checkout(tmp_path)
    status, said = finish(finished)
    assert status == 0, said
    chosen = [each for each in damage.cases(random.Random(0)) if each[0] in CASES]
    assert len(chosen) == len(CASES)
    for name, apply in chosen:
        path = copy_checkout(finished, tmp_path / "damaged")
        apply(path)
        outcome = damage.judge(finished, path, *finish(path))
        assert not outcome.startswith("WRONG"), f"{name}: {outcome}"


CASES = {
    "flip artifacts/checkpoint/model.safetensors",
    "cut reports/evaluation.json",
    "flip the cache's artifacts/checkpoint/model.safetensors",
    "flip dvc.lock (1)",
}


def test_the_judge_can_tell(tmp_path):
    """A result that differs, or an error of many lines, is not let pass."""
    for name in ("finished", "damaged"):
        (tmp_path / name / "artifacts").mkdir(parents=True)
        (tmp_path / name / "artifacts/plan.json").write_text(name)
    finished, damaged = tmp_path / "finished", tmp_path / "damaged"
    assert damage.judge(finished, damaged, 0, "") == "WRONG: artifacts/plan.json differ"
    assert damage.judge(finished, finished, 1, "error: a: b; c\n") == "refused: error: a: b; c"
    assert damage.judge(finished, finished, 1, "Traceback ...\nerror: a\n").startswith("WRONG")
    assert damage.judge(finished, finished, 0, "") == "made again (DVC asked again)"
