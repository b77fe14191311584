"""What the kernel study found, in numbers and in words."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nirvana.errors import InputError
from nirvana.files import atomic_file
from studies.tracking import Series

Rows = Sequence[Mapping[str, Any]]
OURS = "nirvana"


def methods_of(rows: Rows) -> list[str]:
    """Return the methods that occur, in their order."""
    return list(dict.fromkeys(row["method"] for row in rows))


def ratios_of(kernels: Rows) -> list[float]:
    """Return the pruning ratios that occur, ascending."""
    return sorted({row["ratio"] for row in kernels})


def by_seed(rows: Rows, value: str, **where: Any) -> np.ndarray:
    """Return one value a row that matches, in the order of the seeds and, within a seed, of the ratios."""
    found = [row for row in rows if all(row[name] == wanted for name, wanted in where.items())]
    found.sort(key=lambda row: (row["seed"], row.get("ratio", 0)))
    return np.array([row[value] for row in found], dtype=np.float64)


def spread(values: np.ndarray) -> tuple[float, float]:
    """Return the mean over seeds and the standard deviation between them."""
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0


def with_spread(values: np.ndarray) -> str:
    """Write mean ± standard deviation."""
    mean, deviation = spread(values)
    return f"{mean:.3f} ± {deviation:.3f}"


def verdict(kernels: Rows, curves: Rows, ratio: float) -> list[str]:
    """Say whether NIRVANA's claims held: a sentence or two on the kernel, and on fine-tuning at `ratio`.

    Everything is compared within a seed: the same model, calibration text and fine-tuning text.
    """
    return [_kernel_verdict(kernels), _curve_verdict(curves, ratio)]


def _kernel_verdict(kernels: Rows) -> str:
    # ratios of one model are no further evidence: they count as one
    ratios = ratios_of(kernels)

    def by_model(value: str, method: str) -> np.ndarray:
        return by_seed(kernels, value, method=method).reshape(-1, len(ratios)).mean(axis=1)

    rivals = [method for method in methods_of(kernels) if method != OURS]
    ours, cosine = by_model("relative_change", OURS), by_model("alignment", OURS)
    wins = {rival: int((ours < by_model("relative_change", rival)).sum()) for rival in rivals}
    closer = {rival: int((cosine > by_model("alignment", rival)).sum()) for rival in rivals}
    return (
        f"Kernel: the claim {_held(wins, len(ours))}. Of {len(ours)} models, over all {len(ratios)} ratios, NIRVANA "
        f"moved it less than {_counts(wins)}; turned it less (cosine) than {_counts(closer)}. It is the kernel of the "
        "objective that NIRVANA scores with, and that the others never see."
    )


def _curve_verdict(curves: Rows, ratio: float) -> str:
    last = {row["method"]: by_seed(endpoints(curves), "last", method=row["method"]) for row in curves}
    margins = {method: last[method] - last[OURS] for method in last if method not in (OURS, "dense")}
    wins = {rival: int((margin > 0).sum()) for rival, margin in margins.items()}
    ahead = ", ".join(f"{with_spread(margin)} below {rival}'s" for rival, margin in margins.items())
    return (
        f"Fine-tuning after ratio {ratio:g}: the claim {_held(wins, len(last[OURS]))}. Of {len(last[OURS])} models "
        f"NIRVANA's ended better than {_counts(wins)}; after {curves[0]['steps'][-1]} steps its loss is {ahead}, and "
        f"{with_spread(last[OURS] - last['dense'])} above that of the dense model, tuned alike (nats a token)."
    )


def _held(wins: Mapping[str, int], of: int) -> str:
    if all(count == of for count in wins.values()):
        return "held, without exception"
    return "held on the whole" if all(2 * count > of for count in wins.values()) else "did not hold"


def _counts(wins: Mapping[str, int]) -> str:
    return " and ".join(f"{rival} in {count}" for rival, count in wins.items())


def endpoints(curves: Rows) -> list[dict[str, Any]]:
    """Return each curve's first and last loss."""
    return [{**row, "first": row["losses"][0], "last": row["losses"][-1]} for row in curves]


def kernel_table(kernels: Rows) -> list[list[str]]:
    """Return the relative kernel change as text: a header, then one row a ratio, mean ± deviation over seeds."""
    methods = methods_of(kernels)
    rows = [
        [f"{ratio:g}", *(with_spread(by_seed(kernels, "relative_change", method=m, ratio=ratio)) for m in methods)]
        for ratio in ratios_of(kernels)
    ]
    return [["ratio", *methods], *rows]


def curve_table(curves: Rows) -> list[list[str]]:
    """Return the losses before and after fine-tuning as text: a header, then one row a method."""
    ends = endpoints(curves)
    rows = [
        [method, *(with_spread(by_seed(ends, which, method=method)) for which in ("first", "last"))]
        for method in methods_of(curves)
    ]
    return [["", "before", f"after {curves[0]['steps'][-1]} steps"], *rows]


def write_tables(kernels: Rows, curves: Rows, path: Path) -> list[Path]:
    """Write all measurements as CSV, not rounded: kernels to `path`, curves beside it."""
    points = [
        {"seed": curve["seed"], "method": curve["method"], "step": step, "loss": loss}
        for curve in curves
        for step, loss in zip(curve["steps"], curve["losses"], strict=True)
    ]
    written = []
    for file, rows in ((path, kernels), (path.with_name(f"{path.stem}_finetuning.csv"), points)):
        if not rows:
            raise InputError(f"{file}: expected measurements, got none; ask for at least one seed and one ratio")
        with atomic_file(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as opened:
            writer = csv.DictWriter(opened, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        written.append(file)
    return written


def series(kernels: Rows, curves: Rows) -> dict[str, list[Series]]:
    """Return the means over seeds as MLflow takes them: by ratio in percent, and by optimiser step."""
    result: dict[str, list[Series]] = {}
    for method in methods_of(curves):
        losses = np.mean([row["losses"] for row in curves if row["method"] == method], axis=0)
        points = [(int(step), float(loss)) for step, loss in zip(curves[0]["steps"], losses, strict=True)]
        result[method] = [Series("finetuning_loss", points)]
    for method in methods_of(kernels):
        for metric in ("relative_change", "alignment", "loss"):
            values = [(r, spread(by_seed(kernels, metric, method=method, ratio=r))[0]) for r in ratios_of(kernels)]
            result[method].append(Series(f"{metric}_by_ratio_percent", [(round(100 * r), v) for r, v in values]))
    return result
