"""What a study prints."""

from types import SimpleNamespace

from flows.outcome import show


def made(tables, conclusion):
    return SimpleNamespace(tables=tables, conclusion=conclusion, notes=[], files=[])


def test_a_narrow_terminal_cuts_no_figure_off(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    interval = "+0.036 [+0.022, +0.049]"
    rows = [("method", "ratio", "loss above reference"), ("a method of a long name " * 5, "0.2", interval)]
    show(made({"Loss": rows}, ["One is better."]), "run")
    printed = capsys.readouterr().out
    assert any("a long name" in line and interval in line for line in printed.splitlines())
    assert "One is better." in printed


def test_an_outcome_without_tables_is_shown(capsys):
    show(made({}, ["Nothing to compare."]), "run")
    assert "Nothing to compare." in capsys.readouterr().out
