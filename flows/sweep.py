"""What the flows of the sweeps share: measure, judge beside a reference, draw, record.

A sweep's module in studies.sweep has `Settings`, `measure`, `cells_of`, `verdict`, `tables`, `children` and
`notes`.
"""

from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from flows.outcome import Outcome, as_table
from flows.study import PICTURES, Asked, Subject, record, set_environment, subject, task, text_parameters


@task
def measure(name: str, on: Subject, settings: Any) -> list[dict[str, Any]]:
    """Prune, and judge or time."""
    from studies.comparison import Comparison

    rows: list[dict[str, Any]] = _of(name).measure(Comparison(on.model, on.texts), settings)
    return rows


@task
def report(name: str, cells: list[Any], dense_perplexity: float) -> list[Path]:
    """Write table and picture."""
    from studies.sweep.cells import write_cells
    from studies.sweep.pictures import DRAW

    picture = PICTURES / f"{name}.png"
    return [*DRAW[name](cells, dense_perplexity, picture), write_cells(cells, picture.with_suffix(".csv"))]


def sweep(name: str, asked: Asked, changed: dict[str, Any]) -> Outcome:
    """Run a sweep inside its flow.

    Args:
        name: Of its module in studies.sweep.
        asked: What the command line says.
        changed: Fields of the module's `Settings` that are not the default.
    """
    set_environment(asked)
    module = _of(name)
    settings = replace(module.Settings(), **changed)
    on = subject(asked)
    rows = measure(name, on, settings)
    from studies.sweep.cells import perplexity

    cells, dense_perplexity = module.cells_of(rows), perplexity(rows[0])
    conclusion = module.verdict(cells)
    files = report(name, cells, dense_perplexity)
    run_id = record(name, asdict(settings) | text_parameters(on.texts), module.children(cells), files, conclusion)
    tables = [as_table(title, body) for title, body in module.tables(cells).items()]
    notes = [f"dense perplexity {dense_perplexity:.2f}", *module.notes(cells)]
    return Outcome(tables, conclusion, files, run_id, notes)


def _of(name: str) -> Any:
    return import_module(f"studies.sweep.{name}")  # imports torch: after the threads are set
