"""What two sweeps measure besides quality: whether gamma could be had, and how fast a rounded checkpoint is.

Speed is that of the checkpoint as it would be used: written to a scratch directory, loaded, and timed in turns with the
dense model and the other roundings of its ratio.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nirvana.allocation import module_rates
from nirvana.benchmark import Latency, Workload, machine_of, measure_rounds
from nirvana.device import available_bytes
from nirvana.files import scratch_directory
from nirvana.footprint import float32_bytes
from nirvana.loading import load_model
from studies.comparison import Comparison, Row
from studies.lines import Line, Rows
from studies.measure import UNREACHABLE, rows
from studies.spec import Spec
from studies.store import STUDIES, cached
from studies.subject import Subject
from studies.variants import DENSE, Variant

PHASES = ("prefill", "decode")
_CPU = torch.device("cpu")


def cap_gammas(lines: Sequence[Line], _rows: Rows, _values: Mapping[str, Any]) -> Sequence[Line]:
    """Say of each line whether it is capped: attention or MLP cannot lose as much as gamma asks for."""
    for line in lines:
        if line.get("capped"):
            gamma = line["gamma"]
            line["capped"] = gamma is not None and is_capped(line["capped"], line["ratio"], gamma)
    return lines


def is_capped(modules: Mapping[str, Any], ratio: float, gamma: float) -> bool:
    """Tell whether attention lost another share than gamma asks for, by more than one KV group."""
    weights = {module: modules[module]["weights"] for module in ("attention", "mlp")}
    asked = module_rates(weights, None, ratio, gamma)["attention"]
    attention = modules["attention"]
    return abs(attention["achieved"] - asked) * attention["units"] > 1 + 1e-6


def timed_rows(subject: Subject, spec: Spec, values: Mapping[str, Any]) -> list[Row]:
    """Return the judged rows with `{phase}_ms`, the median of the rounds, and pruned / dense with its quartiles."""
    found = rows(subject, spec, values)
    workload = Workload(1, values["prompt_length"], values["decode_tokens"], values["repeats"], values["warmup"])
    for ratio in values["ratios"]:
        reached = [row for row in found if row["ratio"] == ratio and UNREACHABLE not in row]
        if reached:
            timed = latencies(subject.comparison, [Variant.of(row) for row in reached], workload)
            for row, each in zip(reached, timed, strict=True):
                for phase, of in each.items():
                    row[f"{phase}_ms"] = float(np.median(of["pruned"]))
                    quartiles = ratio_of_rounds(of["pruned"], of[DENSE])
                    row |= {f"{phase}_{name}": value for name, value in quartiles.items()}
    return found


def latencies(comparison: Comparison, variants: Sequence[Variant], workload: Workload) -> list[dict[str, Any]]:
    """Return each variant's latencies in ms by phase, and `dense` or `pruned`: one a round, the two seconds apart."""
    key: dict[str, Any] = {"study": "alignment", "kind": "latencies", "model": comparison.model}
    key |= {"variants": [comparison.key(each) for each in variants]}
    key |= {"workload": asdict(workload), "computer": machine_of(_CPU)}
    timed = cached(key, lambda: _latencies(comparison, variants, workload))
    return [timed[str(number)] for number in range(len(variants))]


def _latencies(comparison: Comparison, variants: Sequence[Variant], workload: Workload) -> dict[str, Any]:
    result: dict[str, Any] = {}
    STUDIES.mkdir(parents=True, exist_ok=True)
    with scratch_directory(STUDIES / "alignment") as scratch:
        directories = {DENSE: comparison.model_directory}
        for number, variant in enumerate(variants):
            (scratch / f"{number}").mkdir()
            directories[f"{number}"] = variant.kind.written(comparison, variant, scratch / f"{number}")[0]
        for names in groups(directories):
            rounds = measure_rounds({name: load_model(directories[name]) for name in names}, workload)
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


def ratio_of_rounds(pruned: Sequence[float], dense: Sequence[float]) -> dict[str, float]:
    """Return the median of pruned / dense over rounds, and its quartiles: what a slow round does to both cancels."""
    low, middle, high = np.percentile(np.array(pruned) / np.array(dense), (25, 50, 75))
    return {"ratio": float(middle), "low": float(low), "high": float(high)}
