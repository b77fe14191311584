"""What fine-tuning makes of pruned models, as tables and sentences."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nirvana.files import atomic_file
from studies.bootstrap import Interval, paired_bootstrap
from studies.comparison import DENSE
from studies.titles import standing, titled
from studies.tracking import Series

Rows = Sequence[Mapping[str, Any]]
_COLUMNS = ("tokens", "training_loss", "heldout_loss")


@dataclass(frozen=True)
class Line:
    """A method's model or the dense one, before and after training; losses in nats a token of the evaluation text."""

    method: str
    compensation: str
    ratio: float
    achieved_ratio: float
    adapter_parameters: int
    curve: tuple[tuple[int, float | None, float], ...]
    """Tokens trained on, the training loss since the last point, the loss on held-out text."""
    before: float
    after: float
    gain: Interval
    """`before` less `after`, above 0 where it learns, with its 95 % paired bootstrap interval over windows."""
    above_before: Interval
    above_after: Interval
    """Loss less the reference's, before and after: above 0 is worse."""
    seconds_a_step: float

    @property
    def tokens(self) -> int:
        """Tokens that it was trained on."""
        return self.curve[-1][0]


@dataclass(frozen=True)
class Dense:
    """The dense model's losses, not fine-tuned."""

    evaluation: float
    heldout: float


def summary(rows: Rows, reference: tuple[str, str]) -> tuple[Dense, list[Line]]:
    """Return the dense model's losses and a line a method, in the order asked for.

    Args:
        rows: `studies.fine_tuning.study.measure`'s.
        reference: Method and compensation that the others are compared with, window by window.
    """
    dense, *tuned = rows
    ours = next(row for row in tuned if _names(row) == reference)
    lines = [_line(row, ours) for row in tuned]
    return Dense(_mean(dense["losses"]), ours["dense_heldout_loss"]), lines


def _line(row: Mapping[str, Any], reference: Mapping[str, Any]) -> Line:
    return Line(
        method=row["method"],
        compensation=row["compensation"],
        ratio=row["ratio"],
        achieved_ratio=row["achieved_ratio"],
        adapter_parameters=row["adapter_parameters"],
        curve=tuple((point["tokens"], point["training_loss"], point["heldout_loss"]) for point in row["curve"]),
        before=_mean(row["before"]),
        after=_mean(row["after"]),
        gain=paired_bootstrap(row["before"], row["after"]),
        above_before=paired_bootstrap(row["before"], reference["before"]),
        above_after=paired_bootstrap(row["after"], reference["after"]),
        seconds_a_step=row["seconds_a_step"],
    )


def _names(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["method"], row["compensation"]


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses)


def called(line: Line) -> str:
    """Return what a model is called: `NIRVANA`, `mask Fisher + LS`, `fine-tuned dense`."""
    if line.method == DENSE:
        return f"fine-tuned {DENSE}"
    name = titled(line.method)
    return name + {"none": "", "bias": " + bias", "least_squares": " + LS"}[line.compensation]


def is_reference(line: Line, reference: tuple[str, str]) -> bool:
    """Tell whether the others are compared with this one."""
    return (line.method, line.compensation) == reference


# --- for a reader -----------------------------------------------------------------------------------------------


def table(dense: Dense, lines: Sequence[Line], reference: tuple[str, str]) -> list[list[str]]:
    """Return the lines as text: a header, the dense model's row, then one each, the least loss after training first."""
    heading = ["model", "before", "after", "gain", "above reference\nbefore", "above reference\nafter"]
    ordered = sorted(lines, key=lambda line: line.after)
    return [heading, [DENSE, f"{dense.evaluation:.3f}", *[""] * 4], *(_shown(line, reference) for line in ordered)]


def _shown(line: Line, reference: tuple[str, str]) -> list[str]:
    ours = is_reference(line, reference)
    above = ["the reference", ""] if ours else [_written(line.above_before), _written(line.above_after)]
    return [called(line), f"{line.before:.3f}", f"{line.after:.3f}", f"{line.gain.difference:+.3f}", *above]


def _written(interval: Interval) -> str:
    return f"{interval.difference:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


def verdict(dense: Dense, lines: Sequence[Line], reference: tuple[str, str]) -> list[str]:
    """Say whether the models learn, and whether the reference's lead outlasts training."""
    ours = next(line for line in lines if is_reference(line, reference))
    others = [line for line in lines if line is not ours and line.method != DENSE]
    start = f"Ratio {ours.ratio:g}, {ours.tokens:,} tokens: {called(ours)} goes from loss {ours.before:.3f} to "
    start += f"{ours.after:.3f} (dense {dense.evaluation:.3f})"
    if others:
        standings = [
            standing({called(x): getattr(x, when) for x in others}) for when in ("above_before", "above_after")
        ]
        start += f"; before training it is {standings[0]}; after training {standings[1]}"
    pruned = [line for line in lines if line.method != DENSE]
    learners = [line for line in pruned if line.gain.low > 0]
    most, least = (pick(pruned, key=lambda line: line.gain.difference) for pick in (max, min))
    learned = f"Surely learn (95 %): {len(learners)} of {len(pruned)} pruned models"
    if len(pruned) > 1:
        learned += f"; {called(most)} gains most ({most.gain.difference:+.3f} nats a token)"
        learned += f", {called(least)} least ({least.gain.difference:+.3f})"
    learned += "".join(
        f"; the dense model {line.gain.difference:+.3f} by the same training" for line in lines if line.method == DENSE
    )
    return [f"{start}.", f"{learned}.", "Intervals are over windows, of one training run each."]


# --- for programs -----------------------------------------------------------------------------------------------


def write_tables(dense: Dense, lines: Sequence[Line], path: Path) -> list[Path]:
    """Write the lines as CSV, not rounded, and the learning curves beside them."""
    points = [
        {"model": called(line), **dict(zip(_COLUMNS, point, strict=True))} for line in lines for point in line.curve
    ]
    points.append({"model": DENSE, "tokens": 0, "heldout_loss": dense.heldout})
    whole = {"method": DENSE, "before": dense.evaluation}
    beside = path.with_name(f"{path.stem}_curves.csv")
    return [_write(path, [*map(_flat, lines), whole]), _write(beside, points)]


def _flat(line: Line) -> dict[str, Any]:
    values = asdict(line) | {"tokens": line.tokens}
    del values["curve"]  # in a file of its own
    for name in ("gain", "above_before", "above_after"):
        values |= dict(zip((name, f"{name}_low", f"{name}_high"), getattr(line, name), strict=True))
    return values


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(rows[0]), lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def series(lines: Sequence[Line]) -> dict[str, list[Series]]:
    """Return the curves as MLflow takes them, a child a model; steps are tokens trained on."""
    return {
        called(line): [
            Series("heldout_loss", [(tokens, loss) for tokens, _, loss in line.curve]),
            Series("training_loss", [(tokens, loss) for tokens, loss, _ in line.curve if loss is not None]),
            Series("evaluation_loss", [(0, line.before), (line.tokens, line.after)]),
            Series(
                "evaluation_loss_above_reference",
                [(0, line.above_before.difference), (line.tokens, line.above_after.difference)],
            ),
        ]
        for line in lines
    }
