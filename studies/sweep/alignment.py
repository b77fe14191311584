"""What does it cost, and what does it gain, to keep neurons in multiples of 1, 8, 64 or 128?

Quality is judged as in every comparison. Speed is that of the checkpoint as it would be used: written to a scratch
directory, loaded, and timed in turns with the dense model and the other roundings of its ratio.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nirvana.allocation import Keep
from nirvana.benchmark import Latency, Workload, machine_of, measure_rounds
from nirvana.device import available_bytes
from nirvana.files import scratch_directory
from nirvana.footprint import float32_bytes
from nirvana.loading import load_model
from nirvana.plan import Plan
from nirvana.surgery import prune
from studies.comparison import DENSE, Comparison
from studies.methods import method_named
from studies.store import STUDIES, cached
from studies.sweep.cells import (
    SHOWN,
    UNREACHABLE,
    Cell,
    Row,
    cell,
    reference_of,
    series,
    shown,
    unless_unreachable,
    verdict_of,
)
from studies.tracking import Series

STUDY = "alignment"
NAMES = ("method", "ratio", "round_to")
PHASES = ("prefill", "decode")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """What is pruned, and what is timed: `repeats` rounds, all models of a ratio in each of them."""

    method: str = "nirvana"
    round_to: tuple[int, ...] = (1, 8, 64, 128)
    ratios: tuple[float, ...] = (0.2, 0.4)
    prompt_length: int = 256
    decode_tokens: int = 16
    repeats: int = 9
    warmup: int = 1

    @property
    def workload(self) -> Workload:
        """What is timed: one prompt at a time."""
        return Workload(1, self.prompt_length, self.decode_tokens, self.repeats, self.warmup)


def measure(comparison: Comparison, settings: Settings) -> list[dict[str, Any]]:
    """Return the dense model's row and one a ratio and rounding; known ones are not computed again.

    Raises:
        InputError: If the method is unknown.
    """
    method_named(settings.method)
    wanted = [(ratio, round_to) for ratio in settings.ratios for round_to in sorted(set(settings.round_to))]
    rows = [comparison.dense() | {"round_to": 0}]
    with tqdm(wanted, desc="judging", unit="row") as bar:
        for ratio, round_to in bar:
            bar.set_postfix_str(f"{ratio:g} round_to {round_to}")
            names = {"method": settings.method, "ratio": ratio, "round_to": round_to}
            rows.append(unless_unreachable(names, lambda of=(ratio, round_to): _row(comparison, settings.method, *of)))  # type: ignore[misc]
    for ratio in settings.ratios:
        reached = [row for row in rows if row["ratio"] == ratio and UNREACHABLE not in row]
        if reached:
            timed = latencies(comparison, settings, ratio, [row["round_to"] for row in reached])
            for row in reached:
                row["latencies"] = timed[str(row["round_to"])]
    return rows


def _row(comparison: Comparison, method: str, ratio: float, round_to: int) -> dict[str, Any]:
    return comparison.row(method, ratio, round_to=round_to)


# --- speed ----------------------------------------------------------------------------------------------------


def latencies(comparison: Comparison, settings: Settings, ratio: float, round_to: Sequence[int]) -> dict[str, Any]:
    """Return latencies in ms by rounding, phase, and `dense` or `pruned`: one a round, the two seconds apart."""
    key = {"study": STUDY, "kind": "latencies", "model": comparison.model, "method": settings.method, "ratio": ratio}
    key |= {"round_to": list(round_to), "calibration": comparison.texts.calibration.digest}
    key |= {"workload": asdict(settings.workload), "computer": machine_of(_CPU)}
    return cached(key, lambda: _latencies(comparison, settings, ratio, round_to))


def _latencies(comparison: Comparison, settings: Settings, ratio: float, round_to: Sequence[int]) -> dict[str, Any]:
    with ExitStack() as scratch:
        directories = {DENSE: comparison.model_directory}
        for multiple in round_to:
            keep, _ = comparison.keep(settings.method, ratio, round_to=multiple)
            directories[str(multiple)] = scratch.enter_context(checkpoint(comparison, keep, ratio, f"{multiple}"))
        result: dict[str, Any] = {}
        for names in groups(directories):
            rounds = measure_rounds({name: load_model(directories[name]) for name in names}, settings.workload)
            dense = rounds.pop(DENSE)
            result |= {name: {phase: _by_model(phase, dense, of) for phase in PHASES} for name, of in rounds.items()}
    return result


def _by_model(phase: str, dense: Sequence[Latency], pruned: Sequence[Latency]) -> dict[str, list[float]]:
    return {name: [getattr(each, f"{phase}_ms") for each in of] for name, of in ((DENSE, dense), ("pruned", pruned))}


def groups(directories: Mapping[str, Path]) -> list[list[str]]:
    """Return which models are timed together: all if they fit into half of the free memory, else each with dense."""
    if sum(map(float32_bytes, directories.values())) <= available_bytes(_CPU) / 2:
        return [list(directories)]
    return [[DENSE, name] for name in directories if name != DENSE]


@contextmanager
def checkpoint(comparison: Comparison, keep: Keep, ratio: float, name: str) -> Iterator[Path]:
    """Yield the directory of a pruned checkpoint, gone afterwards."""
    plan = Plan.build(
        comparison.stack.architecture.sites(),
        keep,
        model_digest=comparison.model,
        model_type=comparison.stack.architecture.model_type,
        calibration_digest=comparison.texts.calibration.digest,
        parameters={"pruning_ratio": ratio},
    )
    with scratch_directory(STUDIES / STUDY / name) as directory:
        prune(comparison.model_directory, plan, directory / "checkpoint")
        yield directory / "checkpoint"


def ratio_of_rounds(pruned: Sequence[float], dense: Sequence[float]) -> dict[str, float]:
    """Return the median of pruned / dense over rounds, and its quartiles: what a slow round does to both cancels."""
    low, middle, high = np.percentile(np.array(pruned) / np.array(dense), (25, 50, 75))
    return {"ratio": float(middle), "low": float(low), "high": float(high)}


# --- what came out --------------------------------------------------------------------------------------------


def cells_of(rows: Sequence[Row]) -> list[Cell]:
    """Return a cell a row but the dense one's, held against the finest rounding that its ratio was reached with."""
    found = []
    for row in rows:
        if row["method"] == DENSE:
            continue
        more: dict[str, Any] = {}
        for phase, of in row.get("latencies", {}).items():
            more[f"{phase}_ms"] = float(np.median(of["pruned"]))
            more |= {f"{phase}_{name}": value for name, value in ratio_of_rounds(of["pruned"], of[DENSE]).items()}
        found.append(cell(row, NAMES, reference_of(rows, method=row["method"], ratio=row["ratio"]), more))
    return found


def ratios_of(cells: Sequence[Cell]) -> list[float]:
    """Return the ratios that occur, ascending."""
    return sorted({each.names["ratio"] for each in cells})


def reached_at(cells: Sequence[Cell], ratio: float) -> list[Cell]:
    """Return the cells of one ratio that were reached; the first is the reference."""
    return [each for each in cells if each.names["ratio"] == ratio and each.judged]


def verdict(cells: Sequence[Cell]) -> list[str]:
    """Say at each ratio what each rounding costs and gains beside the finest."""
    sentences = []
    for ratio in ratios_of(cells):
        reached = reached_at(cells, ratio)
        if not reached:
            sentences.append(f"Ratio {ratio:g}: no rounding reaches it.")
            continue
        finest = reached[0]
        sentence = f"Ratio {ratio:g}: with round_to {finest.names['round_to']} perplexity is "
        sentence += f"{finest.found.token_perplexity:.2f}, {_speed(finest)} of the dense latency"
        parts = [
            f"{each.names['round_to']} is {verdict_of(each.found)}, {_speed(each)}"
            for each in reached
            if each != finest
        ]
        sentences.append("; ".join([sentence, *parts]) + ".")
    return sentences


def _speed(each: Cell) -> str:
    return f"prefill {each.more['prefill_ratio']:.2f} and decode {each.more['decode_ratio']:.2f}"


def tables(cells: Sequence[Cell]) -> dict[str, list[list[str]]]:
    """Return the cells as text, by title: quality and speed of each ratio, a header, then one row each."""
    result = {}
    for ratio in ratios_of(cells):
        of, reached = [each for each in cells if each.names["ratio"] == ratio], reached_at(cells, ratio)
        quality = [[f"{each.names['round_to']}", *shown(each.judged, each in reached[:1])] for each in of]
        speed = [
            [f"{each.names['round_to']}", f"{each.found.achieved_ratio:.4f}", *(_speed_of(each, p) for p in PHASES)]
            for each in reached
        ]
        title = f"Ratio {ratio:g}; differences to the finest rounding with 95 % intervals"
        result[title] = [["round_to", *SHOWN], *quality]
        title = f"Ratio {ratio:g}; latency, pruned / dense: median of rounds and their middle half"
        result[title] = [["round_to", "achieved", *PHASES], *speed]
    return result


def _speed_of(each: Cell, phase: str) -> str:
    ratio, low, high = (each.more[f"{phase}_{name}"] for name in ("ratio", "low", "high"))
    return f"{ratio:.2f} [{low:.2f}, {high:.2f}]"


def notes(cells: Sequence[Cell]) -> list[str]:
    """Return what the tables need to be read."""
    return sorted({each.unreachable for each in cells if each.unreachable})


def children(cells: Sequence[Cell]) -> dict[str, list[Series]]:
    """Return what MLflow takes: a child a ratio, by rounding."""
    values = [f"{phase}_{name}" for phase in PHASES for name in ("ms", "ratio")]
    return {
        f"ratio {ratio:g}": series(reached_at(cells, ratio), "round_to", lambda each: each.names["round_to"], values)
        for ratio in ratios_of(cells)
    }
