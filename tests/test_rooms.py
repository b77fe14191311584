"""Imports go one way: flows -> tasks -> nirvana, and the library knows no orchestrator."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "nirvana": {"tasks", "studies", "flows", "benchmarks", "tests", "prefect", "dvc", "mlflow", "lm_eval"},
    "tasks": {"studies", "flows", "benchmarks", "tests", "prefect", "dvc"},
    "studies": {"flows", "benchmarks", "tests", "prefect", "dvc"},
    "flows": {"benchmarks", "tests", "torch", "lm_eval"},
}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("room", FORBIDDEN)
def test_no_import_goes_the_other_way(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    found = {str(f.relative_to(ROOT)): sorted(imported(f) & FORBIDDEN[room]) for f in files}
    assert {file: names for file, names in found.items() if names} == {}


def test_families_are_named_in_one_place_only():
    """Elsewhere a family's name in code is a defect; the modelling file names the stock classes it extends."""
    allowed = {"nirvana/checkpoint/modeling_nirvana.py"}
    for file in sorted((ROOT / "nirvana").rglob("*.py")):
        name = str(file.relative_to(ROOT))
        if name.startswith("nirvana/architectures/") or name in allowed:
            continue
        strings = [n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant)]
        families = {s for s in strings if s in ("llama", "mistral", "qwen2", "qwen3")}
        assert not families, name


LIBRARY = ("checkpoint.modeling_nirvana", "architectures", "walk", "checkpoint", "surgery", "export", "cli")
"""Rooms of nirvana/, the lowest first: none reaches one that stands above it, through whatever modules."""


def library_imports() -> dict[str, set[str]]:
    """Return which modules of nirvana each of them imports, at its top or inside a function."""
    files = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in (ROOT / "nirvana").rglob("*.py")}
    modules = {name.removesuffix(".__init__"): file for name, file in files.items()}
    result = {}
    for name, file in modules.items():
        names = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                submodules = {f"{node.module}.{alias.name}" for alias in node.names} & modules.keys()
                names |= submodules or {node.module}
        result[name] = (names & modules.keys()) - {"nirvana"}
    return result


def room_of(module: str) -> str | None:
    return next((room for room in LIBRARY if f"{module}.".startswith(f"nirvana.{room}.")), None)


@pytest.mark.parametrize("room", LIBRARY)
def test_no_arrow_inside_the_library_runs_back_up(room):
    imports = library_imports()
    reached, waiting = set(), [module for module in imports if room_of(module) == room]
    assert waiting
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting.extend(imports[module])
    above = LIBRARY[LIBRARY.index(room) + 1 :]
    assert sorted(module for module in reached if room_of(module) in above) == []
