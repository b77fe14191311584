"""Records of a step that something else wrote are ignored, and never in the way of the next."""

import logging
from pathlib import Path

import pytest

from tasks.workers.process import last_error, log_file, parsed_line, read_record, recorded, start_logging


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


def test_a_log_is_read_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    before = root.handlers[:], root.level
    assert last_error("prune") is None
    try:
        start_logging("prune")
        logging.getLogger("x").warning("one")
        logging.getLogger("x").error("error: two")
        logging.getLogger("x").info("three")
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers[:], root.level = before
    lines = [parsed_line(line) for line in log_file("prune").read_text().splitlines()]
    assert lines == [(logging.WARNING, "one"), (logging.ERROR, "error: two"), (logging.INFO, "three")]
    assert last_error("prune") == "two" and parsed_line("a print") == (logging.INFO, "a print")
