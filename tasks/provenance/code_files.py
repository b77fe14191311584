"""Which source files a step's result depends on: the transitive imports of its module, read from the syntax tree.

An import counts wherever it stands, at the top or inside a function, unless it serves type checking only. Not code
of any step: the `__init__.py` of `nirvana` and of `tasks`, which hold no logic, and the packages that predict what a
step takes and so decide how it computes, never what: weights resident or streamed, activations kept or recomputed
(tests hold the results equal byte for byte). A string literal that names a file beside the module, or in its
`templates/` directory, is a dependency too: templates, and sources copied as text. So is every module of a package
that an f-string goes on from ("nirvana.architectures.{name}"): they are found by name.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

_PACKAGES = ("nirvana", "tasks", "studies")
_NO_LOGIC = {Path("nirvana/__init__.py"), Path("tasks/__init__.py")}
HOW_NOT_WHAT = (Path("nirvana/estimate"), Path("tasks/estimates"))


def code_files(step_module: Path | str, root: Path | str = ".") -> list[str]:
    """Return the files that a step module needs, itself included, sorted, relative to `root` with forward slashes.

    Args:
        step_module: The module's file, relative to `root`, e.g. tasks/prune.py.
        root: The checkout.

    Raises:
        ValueError: If `nirvana` or `tasks` itself is imported for a name that is not a module: the file that
            defines it would stay unknown.
    """
    root = Path(root)
    found: set[Path] = set()
    waiting = [Path(step_module)]
    while waiting:
        file = waiting.pop()
        if file in found or file in _NO_LOGIC or any(package in file.parents for package in HOW_NOT_WHAT):
            continue
        found.add(file)
        if file.suffix == ".py":
            waiting.extend(_direct(file, root))
    return sorted(file.as_posix() for file in found)


def _direct(file: Path, root: Path) -> Iterator[Path]:
    tree = ast.parse((root / file).read_text(encoding="utf-8"), filename=str(file))
    for node in _runtime_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _module_files(alias.name, root)
        elif isinstance(node, ast.ImportFrom):
            yield from _from_import(node, file, root)
        elif isinstance(node, ast.JoinedStr):
            yield from _named_modules(node, root)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from _named_files(node.value, file, root)


def _runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Walk the tree without the bodies of `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        yield child
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield other
                yield from _runtime_nodes(other)
        else:
            yield from _runtime_nodes(child)


def _from_import(node: ast.ImportFrom, file: Path, root: Path) -> Iterator[Path]:
    base = node.module or ""
    if node.level:  # relative: climb from the file's package
        package = file.parent.parts[: len(file.parent.parts) - node.level + 1]
        base = ".".join((*package, base) if base else package)
    yield from _module_files(base, root)
    for alias in node.names:
        submodule = list(_module_files(f"{base}.{alias.name}", root, exact=True))
        yield from submodule
        if not submodule and base in _PACKAGES:
            raise ValueError(f"{file}:{node.lineno}: import {alias.name} from the module that defines it")


def _module_files(name: str, root: Path, exact: bool = False) -> Iterator[Path]:
    """Yield the file of a module of ours and the `__init__.py` of the packages above it."""
    parts = name.split(".")
    if parts[0] not in _PACKAGES:
        return
    path = Path(*parts)
    candidates = [path.with_suffix(".py"), path / "__init__.py"]
    own = [candidate for candidate in candidates if (root / candidate).is_file()]
    if not own and exact:
        return
    yield from own
    for parent in list(path.parents)[:-1]:
        if (root / parent / "__init__.py").is_file():
            yield parent / "__init__.py"


def _named_modules(text: ast.JoinedStr, root: Path) -> Iterator[Path]:
    start = text.values[0]
    name = start.value if isinstance(start, ast.Constant) and isinstance(start.value, str) else ""
    package = Path(*name.removesuffix(".").split("."))
    if name.endswith(".") and package.parts[:1] in {(each,) for each in _PACKAGES}:
        yield from sorted(file.relative_to(root) for file in (root / package).glob("*.py"))


def _named_files(text: str, file: Path, root: Path) -> Iterator[Path]:
    if not 0 < len(text) <= 100 or "\n" in text or "\0" in text or text.startswith((".", "/")):
        return
    for candidate in (file.parent / text, file.parent / "templates" / text):
        if (root / candidate).is_file():
            yield candidate
