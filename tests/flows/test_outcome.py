"""What a study prints."""

from flows.outcome import Outcome, as_table, show


def test_a_narrow_terminal_cuts_no_figure_off(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    interval = "+0.036 [+0.022, +0.049]"
    rows = [("ratio", "method", "loss above reference"), ("0.2", "a method of a long name " * 5, interval)]
    show(Outcome([as_table("Loss", rows, left=(1,))], ["One is better."], [], "run"))
    printed = capsys.readouterr().out
    assert any("a long name" in line and interval in line for line in printed.splitlines())
    assert "One is better." in printed


def test_an_outcome_without_tables_is_shown(capsys):
    show(Outcome([], ["Nothing to compare."], [], "run"))
    assert "Nothing to compare." in capsys.readouterr().out
