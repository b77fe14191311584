"""Damage in the workspace, in DVC's cache and in DVC's own files: named, and made again, never passed on.

The flow's own code for one step after another, without Prefect, over real DVC in a checkout of toy steps.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from toy import command, dvc, runs, set_param

from tasks.registry import STEPS

pytestmark = pytest.mark.slow

_DRIVE = """
import logging, os, sys
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
import flows.environment
from flows.step import StepFailedError, bring_up_to_date
from tasks.registry import STEPS
os.environ["NIRVANA_DRIVER_PID"] = str(os.getpid())
for step in STEPS[:-1]:  # no MLflow here
    try:
        bring_up_to_date(step.name, logging.getLogger("drive"), 60)
    except StepFailedError as error:
        sys.exit(f"error: {error}")
"""


def drive(path: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return command(path, sys.executable, "-c", _DRIVE, check=check)


def outputs(path: Path) -> dict[str, bytes]:
    found = {}
    for step in STEPS:
        for out in step.outs.values():
            files = sorted((path / out.path).rglob("*")) if (path / out.path).is_dir() else [path / out.path]
            found |= {str(file.relative_to(path)): file.read_bytes() for file in files if file.is_file()}
    return found


def flip(file: Path, keep_time: bool = False) -> None:
    """Flip one bit in place, whatever the mode."""
    before = file.stat()
    file.chmod(0o644)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    with file.open("r+b") as opened:
        opened.write(content)
    file.chmod(before.st_mode)
    if keep_time:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def cached(path: Path, output: str, member: int | None = None) -> Path:
    """Return the cache object of an output, or of one file of it."""
    stages = yaml.safe_load((path / "dvc.lock").read_text())["stages"].values()
    (md5,) = (out["md5"] for stage in stages for out in stage.get("outs", ()) if out["path"] == output)
    found = path / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    if member is None:
        return found
    md5 = json.loads(found.read_text())[member]["md5"]
    return path / ".dvc/cache/files/md5" / md5[:2] / md5[2:]


# -- the workspace ---------------------------------------------------------------------------------------------------


def edited_output(path):
    flip(path / "data/model/content.txt")
    return "data/model/content.txt was changed since fetch_model wrote it", []


def edited_output_with_its_time_set_back(path):
    flip(path / "artifacts/selection.json", keep_time=True)
    return "artifacts/selection.json was changed since score_pool wrote it", []


def cut_output(path):
    file = path / "reports/lm_eval.json"
    file.write_bytes(file.read_bytes()[:3])
    return "reports/lm_eval.json was changed since evaluate wrote it", []


def edit_through_a_link(path):
    """As releases before 0025 linked outputs: the edit changes the cache too."""
    file, kept = path / "artifacts/plan.json", cached(path, "artifacts/plan.json")
    file.unlink()
    file.hardlink_to(kept)
    flip(file)
    return "artifacts/plan.json: not what allocate wrote", ["allocate"]


def edit_through_a_symbolic_link(path):
    file, kept = path / "artifacts/plan.json", cached(path, "artifacts/plan.json")
    file.unlink()
    file.symlink_to(kept)
    flip(kept)
    return "artifacts/plan.json: not what allocate wrote", ["allocate"]


# -- the cache -------------------------------------------------------------------------------------------------------


def rotten_object(path):
    flip(cached(path, "artifacts/plan.json"))
    (path / "artifacts/plan.json").unlink()
    return "content and name differ; dropped from DVC's cache", ["allocate"]


def rotten_object_of_a_directory(path):
    flip(cached(path, "artifacts/checkpoint", 0))
    shutil.rmtree(path / "artifacts/checkpoint")
    return "content and name differ; dropped from DVC's cache", ["prune"]


def rotten_listing_of_a_directory(path):
    flip(cached(path, "artifacts/checkpoint"))
    shutil.rmtree(path / "artifacts/checkpoint")
    return "dropped from DVC's cache", ["prune"]


def rotten_last_output(path):
    flip(cached(path, "reports/report.html"))
    (path / "reports/report.html").unlink()
    return "content and name differ; dropped from DVC's cache", ["report"]


def lost_objects(path):
    """DVC alone would compute all steps again, whose outputs are there."""
    shutil.rmtree(path / ".dvc/cache/files")
    return "", []


# -- DVC's own files -------------------------------------------------------------------------------------------------


def cut_lock(path):
    file = path / "dvc.lock"
    file.write_bytes(file.read_bytes()[:5000] + b"\n  : {")
    return "dvc.lock: damaged", []


def lock_of_another_version(path):
    (path / "dvc.lock").write_text("schema: '7'\nstages: {}\n")
    return "dvc.lock: damaged", []


def flipped_digest_in_the_lock(path):
    file = path / "dvc.lock"
    digest = hashlib.md5((path / "artifacts/plan.json").read_bytes()).hexdigest()
    file.write_text(file.read_text().replace(digest, "0" * 32))
    return "", []


def cut_rwlock(path):
    (path / ".dvc/tmp/rwlock").write_text('{"write": {')
    return ".dvc/tmp/rwlock: damaged", []


def rwlock_that_is_no_text(path):
    (path / ".dvc/tmp/rwlock").write_bytes(b"\xff\xfe\x00")
    return ".dvc/tmp/rwlock: damaged", []


def damaged_run_cache(path):
    for file in (path / ".dvc/cache/runs").glob("*/*/*"):
        file.write_text(file.read_text().replace("path: artifacts/plan.json", "path: artifacts/plam.json"))
    (path / "dvc.lock").unlink()
    return "dropped from DVC's run-cache", ["allocate", "prune", "report"]


def empty_run_cache_entry(path):
    """What a DVC that is killed while it saves leaves; DVC itself then fails with a TypeError."""
    for file in (path / ".dvc/cache/runs").glob("*/*/*"):
        file.unlink()
    (path / "dvc.lock").unlink()
    return "", [step.name for step in STEPS[:-1]]


def damaged_state(path):
    dvc(path, "status")  # it is the checkout's own, named after its path
    where = command(path, sys.executable, "-c", "from flows.own_files import _state_directory as d; print(d())").stdout
    for file in Path(where.strip()).rglob("*.db"):
        file.write_bytes(b"garbage" * 200)
    return "DVC's database of hashes is damaged", []


DAMAGES = [value for name, value in list(globals().items()) if callable(value) and value.__module__ == __name__]
DAMAGES = DAMAGES[DAMAGES.index(edited_output) :]
TOGETHER = [  # those of different files, told apart by what is said
    (edited_output, edited_output_with_its_time_set_back, cut_output, cut_rwlock),
    (edit_through_a_link, rotten_object_of_a_directory, rotten_last_output),
]
ALONE = [(damage,) for damage in DAMAGES if damage not in sum(TOGETHER, ())]


@pytest.mark.parametrize("damages", [*TOGETHER, *ALONE], ids=lambda each: "+".join(of.__name__ for of in each))
def test_damage_is_named_and_made_again(finished_toy, checkout, damages):
    expected = [damage(checkout) for damage in damages]
    done = drive(checkout)
    for said, _ in expected:
        assert said in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert outputs(checkout) == outputs(finished_toy)
    assert runs(checkout) == [step for _, ran in expected for step in ran]
    # and it is over
    again = drive(checkout)
    assert runs(checkout) == [] and "WARNING" not in again.stdout


def test_a_merge_conflict_is_its_owners(checkout):
    file = checkout / "dvc.lock"
    file.write_text("<<<<<<< HEAD\n" + file.read_text() + "=======\n>>>>>>> other\n")
    before = file.read_bytes()
    done = drive(checkout, check=False)
    assert done.returncode == 1 and "error: dvc.lock: expected what DVC wrote, got a merge conflict" in done.stderr
    assert file.read_bytes() == before


def test_plain_dvc_refuses_to_adopt_what_it_does_not_see(checkout):
    """DVC looks at size and time only; the step looks closer."""
    dvc(checkout, "status")
    flip(checkout / "artifacts/unit_saliency/content.txt", keep_time=True)
    set_param(checkout, "pruning_ratio: 0.2 ", "pruning_ratio: 0.4 ")
    done = dvc(checkout, "repro", check=False)
    assert done.returncode != 0 and "score_pool" not in runs(checkout)
    line = "error: artifacts/unit_saliency/content.txt: expected what aggregate_saliency wrote"
    assert line in done.stdout + done.stderr
    drive(checkout)  # the remedy that it names
    set_param(checkout, "pruning_ratio: 0.4 ", "pruning_ratio: 0.2 ")
    drive(checkout)


def test_editing_an_output_leaves_the_cache_alone(checkout):
    kept = cached(checkout, "artifacts/plan.json")
    shutil.rmtree(checkout / "artifacts")
    dvc(checkout, "checkout")
    flip(checkout / "artifacts/plan.json")
    assert hashlib.md5(kept.read_bytes()).hexdigest() == kept.parent.name + kept.name
    assert (checkout / "artifacts/plan.json").stat().st_nlink == 1


def test_linked_outputs_become_copies(checkout):
    file, kept = checkout / "artifacts/plan.json", cached(checkout, "artifacts/plan.json")
    file.unlink()
    file.hardlink_to(kept)
    done = drive(checkout)
    assert "artifacts/plan.json was linked with DVC's cache; it becomes a copy" in done.stdout
    assert file.stat().st_nlink == 1 and file.stat().st_mode & 0o777 == 0o644 and runs(checkout) == []


def test_verify_reads_everything_and_says_what_is_damaged(checkout):
    done = command(checkout, sys.executable, "-m", "flows.verify")
    assert done.stdout.startswith("whole: 23 outputs") or done.stdout.startswith("whole: 24 outputs")
    flip(checkout / "data/corpus/content.txt", keep_time=True)
    flip(cached(checkout, "artifacts/plan.json"))
    done = command(checkout, sys.executable, "-m", "flows.verify", check=False)
    assert done.returncode == 1 and "2 damaged" in done.stdout
    assert "damaged: data/corpus/content.txt: not what fetch_corpus wrote" in done.stdout
    kept = cached(checkout, "artifacts/plan.json")  # its output was whole: the cache got it back
    assert hashlib.md5(kept.read_bytes()).hexdigest() == kept.parent.name + kept.name
    drive(checkout)
    assert "allocate" not in runs(checkout)
    assert command(checkout, sys.executable, "-m", "flows.verify").returncode == 0
