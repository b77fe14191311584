"""Tables of docs/ are what their CSV files say; links and commands of the pages lead somewhere."""

import re
from pathlib import Path

import pytest

from nirvana.errors import InputError
from studies.results import DOCS, Table, as_markdown, main, read_tables, rendered

ROOT = DOCS.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
MARKED = re.compile(r"<!-- table (\w+) -->")


def table(rows, command="make run"):
    return Table("Title", command, "a model", "ten tokens", "a machine", None, rows)


def commands(text: str) -> list[tuple[str, str, str, str]]:
    """Return the modules and the make targets that a text tells its reader to run."""
    return re.findall(
        r"(python -m) ((?:flows|tasks|studies|benchmarks|demos)[\w.]*)|(?:^|`)(make) ([a-z][\w-]*)", text, re.M
    )


def exists(command: tuple[str, str, str, str]) -> bool:
    """Tell whether a module or a make target is there."""
    _, module, _, target = command
    if target:
        return re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M) is not None
    path = ROOT / module.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_columns_of_numbers_are_aligned_right_and_empty_cells_stay_empty():
    rows = [["method", "loss", "mixed"], ["a|b", "-0.1 [-0.2, 0.0]", "1"], ["c", "", "2 sums"]]
    assert as_markdown(table(rows)).splitlines() == [
        "*Title.* `make run` · a model · ten tokens",
        "",
        "| method | loss | mixed |",
        "| --- | ---: | --- |",
        "| a\\|b | -0.1 [-0.2, 0.0] | 1 |",
        "| c |  | 2 sums |",
    ]


def test_a_page_keeps_everything_but_its_tables():
    page = "before\n\n<!-- table one -->\nold\n| 9 |\n<!-- end of table -->\n\nafter\n"
    new = rendered(page, {"one": table([["ratio"], ["0.2"]], command=None)})
    assert new.startswith("before\n\n<!-- table one -->\n*Title.*") and new.endswith("<!-- end of table -->\n\nafter\n")
    assert "| 0.2 |" in new and "| 9 |" not in new and "script not kept" in new
    assert rendered(new, {"one": table([["ratio"], ["0.2"]], command=None)}) == new
    with pytest.raises(InputError, match="one"):
        rendered(page, {})


@pytest.mark.parametrize("fault", ["no file", "no entry", "short row"])
def test_a_folder_that_does_not_agree_is_refused(tmp_path, fault):
    entry = "tables: {one: {title: t, tokens: x}}\ndefaults: {model: m, machine: c, command: null, duration: null}\n"
    (tmp_path / "index.yaml").write_text(entry)
    if fault != "no file":
        (tmp_path / "one.csv").write_text("a,b\n1\n" if fault == "short row" else "a,b\n1,2\n")
    if fault == "no entry":
        (tmp_path / "two.csv").write_text("a\n1\n")
    with pytest.raises(InputError):
        read_tables(tmp_path)


def test_pages_are_rendered_and_hold_every_table_once(capsys):
    assert main([]) == 0, capsys.readouterr().out
    names = [name for page in DOCS.glob("*.md") for name in MARKED.findall(page.read_text(encoding="utf-8"))]
    assert sorted(names) == sorted(read_tables(DOCS / "results"))
    assert len((DOCS / "results.md").read_text(encoding="utf-8").splitlines()) <= 250


@pytest.mark.parametrize("name", list(read_tables(DOCS / "results")))
def test_a_table_says_how_it_was_made(name):
    made = read_tables(DOCS / "results")[name]
    assert all((made.title, made.model, made.tokens, made.machine))
    if made.command is None:
        assert name.startswith("notebook_")
    else:
        (command,) = commands("`" + made.command)
        assert exists(command), made.command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_links_of_a_page_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    assert [command for command in commands(text) if not exists(command)] == []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S)):
        if target.startswith(("http:", "https:")):
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file) if file else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target
