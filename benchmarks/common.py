"""What the benchmarks share: alternating measurement, and the form of their results."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from nirvana.files import write_json

RESULTS = Path("reports/bench")


@dataclass(frozen=True)
class Measurement:
    """One line of a benchmark; `limit` is what it must not exceed, `least` what it must reach, if anything."""

    name: str
    value: float
    unit: str
    limit: float | None = None
    least: float | None = None

    def as_dict(self) -> dict[str, object]:
        bounds = [self.value <= self.limit] if self.limit is not None else []
        bounds += [self.value >= self.least] if self.least is not None else []
        holds = all(bounds) if bounds else None
        return asdict(self) | {"holds": holds}


def write(name: str, measurements: list[Measurement]) -> bool:
    """Write `reports/bench/<name>.json`, show it, and return whether every limit holds."""
    from rich.console import Console
    from rich.table import Table

    write_json(RESULTS / f"{name}.json", [measurement.as_dict() for measurement in measurements])
    table = Table("measurement", "value", "limit", "holds", title=name)
    for measurement in measurements:
        holds = measurement.as_dict()["holds"]
        shown = "" if holds is None else "yes" if holds else "NO"
        limit = "" if measurement.limit is None else f"{measurement.limit:g}"
        if measurement.least is not None:
            limit = f"{measurement.least:g} to {limit}" if limit else f"at least {measurement.least:g}"
        table.add_row(measurement.name, f"{measurement.value:.4g} {measurement.unit}", limit, shown)
    Console().print(table)
    return all(measurement.as_dict()["holds"] is not False for measurement in measurements)


def alternate(
    ways: Mapping[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:
    """Return the median seconds of each way, measured in turns after one warm-up each.

    Args:
        clock: CPU time of all threads by default, which a busy neighbour disturbs less than wall-clock time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            start = clock()
            way()
            if repeat:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def random_text(sequences: int, tokens: int) -> Int[Tensor, "sequences tokens"]:
    """Return fixed token ids: cost does not depend on what they say."""
    return torch.randint(3, 49_000, (sequences, tokens), generator=torch.Generator().manual_seed(0))


def model_directory() -> Path:
    """Return the pipeline's model, fetching it first where it is missing."""
    from nirvana.files import atomic_directory
    from tasks.fetch_model import fetch_model
    from tasks.params import load_params

    for directory in (Path("data/model"), Path(".cache/bench/model")):
        if (directory / "config.json").is_file():
            return directory
    with atomic_directory(directory) as temporary:
        fetch_model(load_params().model.source, temporary)
    return directory
