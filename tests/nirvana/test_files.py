"""Whole or not at all."""

import json
import subprocess
import sys

import pytest

from nirvana.errors import InputError
from nirvana.files import atomic_directory, atomic_file, read_json, sha256_directory, write_json


def test_failed_file_leaves_the_old_one(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert target.read_text() == "old"


def test_directory_replaces_a_full_one(tmp_path):
    for text in ("one", "two"):
        with atomic_directory(tmp_path / "d") as temporary:
            (temporary / text).write_text(text)
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_failed_directory_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "d") as temporary:
        (temporary / "x").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_a_living_one_is_not_disturbed(tmp_path):
    code = """
import os, signal, sys
from nirvana.files import atomic_directory
with atomic_directory(sys.argv[1]) as temporary:
    (temporary / "big").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "d")], check=False)
    assert len(list(tmp_path.glob(".d.*.tmp"))) == 1
    with atomic_directory(tmp_path / "d") as mine, atomic_directory(tmp_path / "d") as other:
        assert mine.exists() and other.exists()
        assert len(list(tmp_path.glob(".d.*.tmp"))) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_json_is_stable_and_refuses_nan(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": [1.5, None]})
    assert (tmp_path / "a.json").read_text() == json.dumps({"a": [1.5, None], "b": 1}, indent=2) + "\n"
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "b.json", float("nan"))
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_cannot_hold_are_refused(number, tmp_path):
    (tmp_path / "a.json").write_text(f'{{"a": [1.5, {number}]}}')
    with pytest.raises(InputError, match=rf"expected JSON, got something else \({number} is no finite number\)"):
        read_json(tmp_path / "a.json")


def test_missing_and_broken_json_are_one_line(tmp_path):
    with pytest.raises(InputError, match="found nothing"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_bytes(b"\xff{")
    with pytest.raises(InputError, match="expected JSON"):
        read_json(tmp_path / "bad.json")


def test_directory_digest_sees_names_and_bytes(tmp_path):
    digests = set()
    for name, text in (("a", "1"), ("a", "2"), ("b", "1")):
        folder = tmp_path / f"{name}{text}"
        folder.mkdir()
        (folder / name).write_text(text)
        digests.add(sha256_directory(folder))
    assert len(digests) == 3
