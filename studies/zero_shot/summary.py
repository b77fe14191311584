"""What pruning costs in zero-shot accuracy, as tables and sentences; ours as a share of what NIRVANA loses."""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nirvana.files import atomic_file
from studies.bootstrap import Interval, paired_bootstrap, resampled_sums
from studies.comparison import BEST, COMPENSATIONS, DENSE
from studies.titles import standing
from studies.tracking import Series

Rows = Sequence[Mapping[str, Any]]
NIRVANA = ("nirvana", "none")
_LEAST_DOCUMENTS = 8
"""Of fewer, to draw whole documents says too little of what others would give."""
ALL = "all"
"""Both kinds of item together."""
ALL_TEXTS = "all texts"
"""Every text's items of both kinds together."""
UNDEFINED = "undefined"
HALF = 0.5
"""Of NIRVANA's loss, what ours aim to lose at most."""
_NORMAL = 1.959964  # of 95 %, two-sided


class Ratio(NamedTuple):
    """A ratio of two mean losses and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """One model on one kind of item; shares of items, not percent."""

    text: str
    kind: str
    method: str
    compensation: str
    ratio: float
    achieved_ratio: float
    items: int
    documents: int
    """That the items are from."""
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    """95 % interval (Wilson), as if items were independent."""
    lost: float
    """Accuracy of the dense model less this one's; below 0 is better than dense."""
    lost_low: float
    lost_high: float
    """95 % paired bootstrap interval over documents; over items of a text that has fewer than eight documents."""
    of_nirvana: float | None
    """`lost` / NIRVANA's at the same ratio; none where NIRVANA's is not surely above 0, or was not measured."""
    of_nirvana_low: float | None
    of_nirvana_high: float | None
    """95 % bootstrap interval, likewise; may be infinite."""
    behind_best: float | None
    """Accuracy of `comparison.BEST` at the same ratio less this one's; none where it was not asked, or is this one."""
    behind_best_low: float | None
    behind_best_high: float | None
    """95 % paired bootstrap interval, likewise."""
    drawn: str
    """What intervals of losses draw with replacement: documents, items, or of some texts these and of others those."""
    seconds_per_item: float


def ratio_of_losses(
    dense: ArrayLike,
    ours: ArrayLike,
    theirs: ArrayLike,
    documents: Sequence[str],
    texts: Sequence[str] | None = None,
    samples: int = 10_000,
    seed: int = 0,
) -> Ratio | None:
    """Return mean(dense − ours) / mean(dense − theirs) and its 95 % percentile interval.

    Documents are drawn with replacement, an item's three answers together. A draw in which theirs lose nothing has no
    finite ratio; it counts as infinite, so that it can widen the interval only.

    Args:
        dense: 1 or 0 an item.
        ours: On the same items.
        theirs: On the same items.
        documents: What each item is from.
        texts: What each document is from: of each text, as many documents are drawn as it has. None: of one.
        samples: Resampled sets of as many documents.
        seed: Of the draw.

    Returns:
        None where the loss of theirs is not surely above 0: its own 95 % interval reaches 0.
    """
    if paired_bootstrap(dense, theirs, groups=documents, strata=texts).low <= 0:
        return None
    both = np.asarray(dense, dtype=np.float64)[:, None] - np.stack([ours, theirs], axis=1)
    lost, theirs_lost, _ = resampled_sums(both, documents, samples, seed, texts).T
    ratios = np.full(samples, np.inf)
    np.divide(lost, theirs_lost, out=ratios, where=theirs_lost > 0)
    # no interpolation: it would make a number of an infinite neighbour
    low, high = np.percentile(ratios, (2.5, 97.5), method="inverted_cdf")
    value = both.mean(axis=0)
    return Ratio(float(value[0] / value[1]), float(low), float(high))


def accuracy_interval(answers: ArrayLike) -> tuple[float, float]:
    """Return the 95 % interval of a share of right answers.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    values = np.asarray(answers, dtype=np.float64)
    count, share, square = len(values), float(values.mean()), _NORMAL**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    reach = _NORMAL / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def lines(rows: Rows) -> list[Line]:
    """Return a line a model and kind of item, one of all items where a text has both kinds, and one of all texts.

    Args:
        rows: `studies.zero_shot.study.measure`'s.

    Returns:
        By text and kind; the dense model first, then by ratio, the most accurate first.
    """
    of_text = [{**row, "texts": [row["text"]] * len(row["answers"])} for row in rows]
    every = [*of_text, *_together(of_text)]
    if len({row["text"] for row in rows}) > 1:
        every += _together([{**row, "text": ALL_TEXTS} for row in of_text])
    answers = {(row["text"], row["kind"], *_model(row)): row["answers"] for row in every}
    found = []
    for text, kind in dict.fromkeys((row["text"], row["kind"]) for row in every):
        mine = [row for row in every if (row["text"], row["kind"]) == (text, kind)]
        dense = answers[(text, kind, DENSE, 0.0, "none")]
        made = [
            _line(row, dense, *(answers.get((text, kind, name, row["ratio"], how)) for name, how in (NIRVANA, BEST)))
            for row in mine
        ]
        found += sorted(made, key=lambda line: (line.ratio, -line.accuracy))
    return sorted(found, key=lambda line: line.text != found[0].text)  # a text's lines stand together


def _model(row: Mapping[str, Any]) -> tuple[str, float, str]:
    return row["method"], row["ratio"], row["compensation"]


def _together(rows: Rows) -> list[dict[str, Any]]:
    """Return rows of both kinds of item."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["text"], *_model(row)), []).append(row)
    return [
        {
            **members[0],
            "kind": ALL,
            **{name: [each for row in members for each in row[name]] for name in ("answers", "documents", "texts")},
            "seconds": sum(row["seconds"] for row in members),
        }
        for members in groups.values()
        if len(members) > 1
    ]


def _units(documents: Sequence[str], texts: Sequence[str]) -> tuple[list[str], str]:
    """Return what of each item is drawn, its document or itself, and what that is called.

    Each text decides for itself, and two may call their documents alike.
    """
    of_text: dict[str, set[str]] = {}
    for document, text in zip(documents, texts, strict=True):
        of_text.setdefault(text, set()).add(document)
    whole = {text for text, held in of_text.items() if len(held) >= _LEAST_DOCUMENTS}
    units = [
        document if text in whole else f"item {number}"
        for number, (document, text) in enumerate(zip(documents, texts, strict=True))
    ]
    return units, "documents" if len(whole) == len(of_text) else "documents or items" if whole else "items"


def _line(
    row: Mapping[str, Any], dense: Sequence[int], nirvana: Sequence[int] | None, best: Sequence[int] | None
) -> Line:
    answers, texts = row["answers"], row["texts"]
    units, drawn = _units(row["documents"], texts)
    low, high = accuracy_interval(answers)
    lost = paired_bootstrap(dense, answers, groups=units, strata=texts)
    share = ratio_of_losses(dense, answers, nirvana, units, texts) if nirvana is not None else None
    rival = best is not None and (row["method"], row["compensation"]) != BEST
    behind = paired_bootstrap(best, answers, groups=units, strata=texts) if best is not None and rival else None
    return Line(
        text=row["text"],
        kind=row["kind"],
        method=row["method"],
        compensation=row["compensation"],
        ratio=row["ratio"],
        achieved_ratio=row["achieved_ratio"],
        items=len(answers),
        documents=len(set(zip(row["documents"], texts, strict=True))),
        accuracy=float(np.mean(answers)),
        accuracy_low=low,
        accuracy_high=high,
        lost=lost.difference,
        lost_low=lost.low,
        lost_high=lost.high,
        of_nirvana=share.value if share else None,
        of_nirvana_low=share.low if share else None,
        of_nirvana_high=share.high if share else None,
        behind_best=behind.difference if behind else None,
        behind_best_low=behind.low if behind else None,
        behind_best_high=behind.high if behind else None,
        drawn=drawn,
        seconds_per_item=row["seconds"] / len(answers),
    )


def called(method: str, compensation: str) -> str:
    """Return what a method with its compensation is called."""
    return method if compensation == "none" else f"{method} + {compensation.replace('_', ' ')}"


def write_table(found: Sequence[Line], path: Path) -> Path:
    """Write the lines as CSV, not rounded; `undefined` where there is no share of NIRVANA's loss."""
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, [each.name for each in fields(Line)], lineterminator="\n")
        writer.writeheader()
        for line in found:
            values = asdict(line)
            if line.method != DENSE:
                values |= {name: UNDEFINED for name in values if name.startswith("of_nirvana") and values[name] is None}
            writer.writerow({name: "" if value is None else value for name, value in values.items()})
    return path


def tables(found: Sequence[Line]) -> dict[str, list[list[str]]]:
    """Return by title a table a text and kind of item: a header, then one row each."""
    result: dict[str, list[list[str]]] = {}
    for text, kind in dict.fromkeys((line.text, line.kind) for line in found):
        mine = [line for line in found if (line.text, line.kind) == (text, kind)]
        title = (
            f"{text}, {kind}: {mine[0].items:,} items of {mine[0].documents:,} documents; percent right and lost "
            f"against dense, with 95 % intervals (of losses: {mine[0].drawn} drawn)"
        )
        heading = ["ratio", "method", "accuracy", "lost", "of nirvana's loss", "behind best"]
        result[title] = [heading, *map(_shown, mine)]
    return result


def _shown(line: Line) -> list[str]:
    accuracy = f"{_points(line.accuracy)} [{100 * line.accuracy_low:.0f}, {100 * line.accuracy_high:.0f}]"
    if line.method == DENSE:
        return ["", DENSE, accuracy, "", "", ""]
    if (line.method, line.compensation) == NIRVANA:
        share = "the measure" if line.of_nirvana is not None else UNDEFINED
    else:
        share = _share(line)
    behind = _behind(line)
    return [
        f"{line.ratio:g}",
        called(line.method, line.compensation),
        accuracy,
        _written(Interval(line.lost, line.lost_low, line.lost_high)),
        share,
        _written(behind) if behind else "",
    ]


def _written(interval: Interval) -> str:
    return f"{_points(interval.difference)} [{_points(interval.low)}, {_points(interval.high)}]"


def _points(share: float) -> str:
    return f"{100 * share:.1f}"


def _share(line: Line) -> str:
    if line.of_nirvana is None or line.of_nirvana_low is None or line.of_nirvana_high is None:
        return UNDEFINED
    high = f"{line.of_nirvana_high:.2f}" if math.isfinite(line.of_nirvana_high) else "∞"
    return f"{line.of_nirvana:.2f} [{line.of_nirvana_low:.2f}, {high}]"


def _against_half(ours: Line) -> str:
    """Say whether the interval leaves a doubt that ours lose at most half."""
    assert ours.of_nirvana_low is not None and ours.of_nirvana_high is not None
    if ours.of_nirvana_high <= HALF:
        return "surely at most half"
    return "surely more than half" if ours.of_nirvana_low > HALF else "not surely apart from half"


def _standing(among: Sequence[Line]) -> str:
    """Say how many rivals ours is surely ahead of, where there are more than NIRVANA."""
    behind = {called(x.method, x.compensation): each for x in among if (each := _behind(x)) is not None}
    return f" It is {standing(behind)}." if len(behind) > 1 else ""


def _behind(line: Line) -> Interval | None:
    values = (line.behind_best, line.behind_best_low, line.behind_best_high)
    return None if None in values else Interval(*values)  # type: ignore[arg-type]


def verdict(found: Sequence[Line]) -> list[str]:
    """Say of each text, ratio and kind of item what share of NIRVANA's loss ours is, and whom it is ahead of."""
    sentences = []
    models = {(line.text, line.kind, line.ratio, line.method, line.compensation): line for line in found}
    # all items first: they are the surest
    keys = dict.fromkeys((line.text, line.ratio, line.kind) for line in found if line.method != DENSE)
    for text, ratio, kind in sorted(keys, key=lambda key: (key[0] != ALL_TEXTS, key[2] != ALL)):
        ours, theirs = (models.get((text, kind, ratio, *each)) for each in (BEST, NIRVANA))
        if ours is None or theirs is None:
            continue
        sentence = (
            f"{text}, ratio {ratio:g}, {kind}: {called(*BEST)} loses {_points(ours.lost)} points, "
            f"{called(*NIRVANA)} {_points(theirs.lost)}"
        )
        if ours.of_nirvana is None or ours.of_nirvana_high is None:
            sentences.append(f"{sentence}; their ratio is undefined, for the latter is not surely above 0.")
        else:
            sentences.append(f"{sentence}; their ratio is {_share(ours)}, {_against_half(ours)}.")
        sentences[-1] += _standing([x for x in found if (x.text, x.ratio, x.kind) == (text, ratio, kind)])
    both = f"{called(*NIRVANA)} and {called(*BEST)}"
    return sentences or [f"No ratio of losses: it takes {both} among the methods."]


def series(found: Sequence[Line]) -> dict[str, list[Series]]:
    """Return accuracy, loss and share of NIRVANA's loss by ratio in percent, a child a method and compensation."""
    result: dict[str, list[Series]] = {}
    order: dict[str, int] = {compensation: number for number, compensation in enumerate(COMPENSATIONS)}
    for way in sorted({(x.method, x.compensation) for x in found}, key=lambda x: (x[0], order[x[1]])):
        mine = [line for line in found if (line.method, line.compensation) == way]
        child = result.setdefault(called(*way), [])
        for text, kind in dict.fromkeys((line.text, line.kind) for line in mine):
            for metric in ("accuracy", "lost", "of_nirvana"):
                points = [
                    (round(100 * line.ratio), value)
                    for line in mine
                    if (line.text, line.kind) == (text, kind) and (value := getattr(line, metric)) is not None
                ]
                name = re.sub(r"[^\w.-]+", "_", f"{metric}_{text}_{kind}_by_ratio_percent")
                child += [Series(name, points)] if points else []
    return result
