"""Records of a step that something else wrote are ignored, and never in the way of the next."""

from pathlib import Path

import pytest

from tasks.workers.process import read_record, recorded


@pytest.mark.parametrize("content", [b"\xff{}", b"{", b"", b"[]", b"[" * 100_000, b"9" * 5000, b"\0"])
def test_what_is_no_record_is_ignored_and_replaced(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / ".cache/steps/prune.json"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert read_record("prune") is None
    with recorded("prune"):
        assert (read_record("prune") or {})["outcome"] == "running"
    assert (read_record("prune") or {})["outcome"] == "completed"


def test_a_directory_in_the_place_of_a_record_is_ignored_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".cache/steps/prune.json/inner").mkdir(parents=True)
    assert read_record("prune") is None
    with recorded("prune"):
        pass
    assert len((read_record("prune") or {})["token"]) == 32
