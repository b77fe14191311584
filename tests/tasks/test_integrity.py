"""What a step reads is what its writer left: held against dvc.lock, by a hash unless nothing was touched."""

import json
import os
import time
from pathlib import Path

import pytest
import yaml

from nirvana.errors import InputError
from tasks.provenance import integrity
from tasks.provenance.integrity import Ledger, check_inputs, differences, note_outputs, recorded_outputs, tree_digest

MODEL, PLAN = Path("data/model"), Path("artifacts/plan.json")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A directory and a file, and a dvc.lock that holds their digests as DVC's own code computes them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    (MODEL / "deep").mkdir(parents=True)
    (MODEL / "config.json").write_text("{}")
    (MODEL / "deep/ümlaut.bin").write_bytes(bytes(range(256)) * 100)
    PLAN.parent.mkdir()
    PLAN.write_text('{"keep": 1}')
    outs = {"fetch_model": MODEL, "allocate": PLAN}
    stages = {
        name: {"cmd": "x", "outs": [{"path": path.as_posix(), "hash": "md5", "md5": dvc_digest(path)}]}
        for name, path in outs.items()
    }
    Path("dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    for file in tmp_path.rglob("*"):
        os.utime(file, (1_000_000_000, 1_000_000_000))
    time.sleep(0.06)  # what changed within the clock's last tick is never believed
    return tmp_path


def dvc_digest(path):
    """Return the digest of DVC's own code."""
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.db.local import LocalHashFileDB
    from dvc_objects.fs.local import localfs

    odb = LocalHashFileDB(localfs, str(path.resolve().parents[1] / "odb"))
    return build(odb, str(path.resolve()), localfs, "md5", dry_run=True)[2].hash_info.value


def flip(file, keep_time=False):
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    with file.open("r+b") as opened:
        opened.write(content)
    if keep_time:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_digests_are_dvcs(checkout):
    ledger = Ledger()
    assert ledger.digest(MODEL) == dvc_digest(MODEL) == recorded_outputs()[MODEL].md5
    assert ledger.digest(PLAN) == dvc_digest(PLAN)
    # computed by hand: md5 of `[{"md5": "99914b932bd37a50b983c5e7c90ae93b", "relpath": "config.json"}]`
    assert tree_digest({"config.json": "99914b932bd37a50b983c5e7c90ae93b"}) == "c34277cb8ccdf6e5ddd319496567fac2.dir"


@pytest.mark.parametrize("keep_time", [False, True])
@pytest.mark.parametrize("file", [MODEL / "config.json", MODEL / "deep/ümlaut.bin", PLAN])
def test_one_changed_bit_is_refused_by_name(checkout, file, keep_time):
    check_inputs([MODEL, PLAN])
    flip(file, keep_time)
    with pytest.raises(InputError, match="`make run` restores it or computes it again") as caught:
        check_inputs([MODEL, PLAN])
    assert str(PLAN if file == PLAN else MODEL) in str(caught.value) and "\n" not in str(caught.value)


def test_the_file_is_named_where_the_cache_knows_the_directory(checkout):
    listed = [{"md5": Ledger().md5(file), "relpath": file.relative_to(MODEL).as_posix()} for file in files(MODEL)]
    digest = recorded_outputs()[MODEL].md5
    (integrity.CACHE / digest[:2]).mkdir(parents=True)
    (integrity.CACHE / digest[:2] / digest[2:]).write_text(json.dumps(listed, sort_keys=True))
    flip(MODEL / "deep/ümlaut.bin")
    (MODEL / "more.txt").touch()
    (found,) = differences([MODEL], Ledger())
    assert found.files == (MODEL / "deep/ümlaut.bin", MODEL / "more.txt")


def files(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


def test_what_was_not_touched_is_not_read_again(checkout, monkeypatch):
    check_inputs([MODEL, PLAN])
    monkeypatch.setattr(integrity.hashlib, "file_digest", lambda *given: pytest.fail("read again"))
    assert Ledger().digest(MODEL) == recorded_outputs()[MODEL].md5


def test_a_damaged_ledger_neither_passes_nor_refuses_anything(checkout):
    check_inputs([MODEL, PLAN])
    text = integrity.LEDGER.read_text()
    integrity.LEDGER.write_text(text.replace(Ledger().md5(PLAN), "0" * 32))
    check_inputs([MODEL, PLAN])
    for broken in ("", "[]", text[: len(text) // 2], '{"artifacts/plan.json": 7}'):
        integrity.LEDGER.write_text(broken)
        check_inputs([MODEL, PLAN])


def test_what_the_lock_does_not_know_is_not_compared(checkout):
    Path("new.json").write_text("1")
    check_inputs([Path("new.json"), Path("absent.json")])
    Path("dvc.lock").unlink()
    flip(PLAN)
    check_inputs([PLAN])


def test_by_hand_the_last_step_by_hand_counts(checkout, monkeypatch):
    PLAN.write_text('{"keep": 2}')
    note_outputs([PLAN])  # allocate was run by hand
    check_inputs([PLAN])
    monkeypatch.setenv("DVC_STAGE", "prune")  # under DVC, dvc.lock alone does
    with pytest.raises(InputError, match="expected what allocate wrote"):
        check_inputs([PLAN])
    monkeypatch.delenv("DVC_STAGE")
    flip(PLAN)
    with pytest.raises(InputError, match="expected what allocate wrote"):
        check_inputs([PLAN])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"stages: {a: {outs: [{path", "got a damaged file"),
        (b"\xff\xfe", "got a damaged file"),
        (b"schema: '2.0'\n", "got a damaged file"),
        (b"stages:\n  a:\n    outs: 5\n", "got a damaged file"),
        (b"<<<<<<< HEAD\nstages: {}\n=======\n>>>>>>> other\n", "got a merge conflict; choose a side"),
    ],
)
def test_a_damaged_lock_is_one_line(checkout, content, said):
    Path("dvc.lock").write_bytes(content)
    with pytest.raises(InputError) as caught:
        check_inputs([PLAN])
    assert str(caught.value).startswith("dvc.lock: expected what DVC wrote, ") and said in str(caught.value)
    assert "\n" not in str(caught.value)
