"""Whole or not at all."""

import json
import os
import subprocess
import sys

import pytest

from nirvana.errors import InputError
from nirvana.files import (
    atomic_directory,
    atomic_file,
    copy_regular,
    read_json,
    read_sealed,
    sha256_directory,
    write_json,
    write_sealed,
)


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


@pytest.fixture
def snapshot(tmp_path):
    """A model as the cache of Hugging Face keeps it."""
    repository = tmp_path / "models--acme--tiny"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "a1").write_text("licence")
    revision = repository / "snapshots" / "0123"
    (revision / "templates").mkdir(parents=True)
    (revision / "LICENSE").symlink_to("../../blobs/a1")
    (revision / "templates" / "a.jinja").symlink_to("../../../blobs/a1")
    return revision


def test_links_inside_and_into_a_cache_are_followed(snapshot, tmp_path):
    copy_regular(snapshot / "LICENSE", tmp_path / "a", snapshot)
    copy_regular(snapshot / "templates" / "a.jinja", tmp_path / "b", snapshot)
    (tmp_path / "reached").symlink_to(snapshot)  # the directory itself may be reached through a link
    copy_regular(tmp_path / "reached" / "LICENSE", tmp_path / "c", tmp_path / "reached")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "one").write_text("licence")
    (plain / "one").chmod(0o600)
    (plain / "two").symlink_to("one")
    copy_regular(plain / "two", tmp_path / "d", plain)
    for name in "abcd":
        assert (tmp_path / name).read_text() == "licence" and not (tmp_path / name).is_symlink()
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o644


def test_links_elsewhere_are_refused_by_name(snapshot, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "a1").write_text("secret")
    for place in (secret, tmp_path / "blobs" / "a1", "../secret", "../../../../secret"):
        link = snapshot / "NOTICE"
        link.symlink_to(place)
        with pytest.raises(InputError, match="NOTICE: expected a file") as refused:
            copy_regular(link, tmp_path / "out", snapshot)
        assert "\n" not in str(refused.value)
        link.unlink()
    assert not (tmp_path / "out").exists()


def test_what_is_no_file_is_refused(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "circle").symlink_to("circle")
    (root / "nowhere").symlink_to("absent")
    (root / "folder").mkdir()
    os.mkfifo(root / "pipe")  # opening one would wait for a writer
    for name in ("circle", "nowhere", "folder", "pipe", "absent"):
        with pytest.raises(InputError, match=name):
            copy_regular(root / name, tmp_path / "out", root)


def test_every_file_gets_the_mode_of_a_new_file(tmp_path):
    """safetensors writes through a temporary file of mode 0600."""
    import torch
    from safetensors.torch import save_file

    with atomic_directory(tmp_path / "d") as directory:
        save_file({"a": torch.ones(2)}, directory / "a.safetensors")
        (directory / "deep").mkdir()
        (directory / "deep/b").touch(0o600)
    with atomic_file(tmp_path / "c.safetensors") as temporary:
        save_file({"a": torch.ones(2)}, temporary)
    umask = os.umask(0)
    os.umask(umask)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 3
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}


def test_no_flipped_bit_and_no_cut_of_a_sealed_file_is_believed(tmp_path):
    file = tmp_path / "value"
    write_sealed(file, b"1.5")
    assert read_sealed(file) == b"1.5"
    whole = file.read_bytes()
    for position in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            file.write_bytes(damaged)
            assert read_sealed(file) is None
        file.write_bytes(whole[:position])
        assert read_sealed(file) is None
    assert read_sealed(tmp_path / "absent") is None
