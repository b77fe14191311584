"""Pruned, then quantised: which models are worth their bytes, and does one damage come on top of the other?

The order is that of practice: units leave, compensation solves for what stays, and the matrices that are left are
rounded, with scales of their own. See `studies.rounding` for what is simulated and what is not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from studies.bootstrap import paired_bootstrap
from studies.lines import Line, Rows
from studies.rounding import STORED
from studies.variants import DENSE, called
from studies.words import stands

_AS_MANY = 1.01  # so much more is no more: rounding of kept units


def mark_front(lines: Sequence[Line], _rows: Rows, _values: Mapping[str, Any]) -> Sequence[Line]:
    """Say of each line whether no other of as few bytes (within a percent) or fewer has as little perplexity."""
    points = [(line["bytes"], line["token_perplexity"]) for line in lines]
    for line, (size, perplexity) in zip(lines, points, strict=True):
        line["on_front"] = not any(
            (other < perplexity and bytes_ <= _AS_MANY * size) or (other == perplexity and bytes_ < size)
            for bytes_, other in points
        )
        line["megabytes"], line["star"] = size / 1e6, " *" if line["on_front"] else ""
    return lines


def sums(rows: Rows, _values: Mapping[str, Any]) -> list[Line]:
    """Return, for each pruned model and precision, two damages alone, added up and together, in nats a token.

    `excess` is `together` less `added`: above 0, each makes the other worse; `low` and `high` are its 95 % paired
    bootstrap interval over windows.
    """
    dense = _losses(rows, rows[0], STORED)
    found = []
    for row in rows:
        if row["method"] == DENSE or row["precision"] == STORED:
            continue
        both, pruned = (_losses(rows, row, precision) for precision in (row["precision"], STORED))
        quantised = _losses(rows, rows[0], row["precision"])
        # window by window: (both − dense) − (pruned − dense) − (quantised − dense)
        interval = paired_bootstrap(both + dense, pruned + quantised)
        of_pruning, of_quantising = (float((each - dense).mean()) for each in (pruned, quantised))
        line = {name: row[name] for name in ("method", "compensation", "ratio", "precision")}
        line |= {"of_pruning": of_pruning, "of_quantising": of_quantising, "added": of_pruning + of_quantising}
        line |= {"together": float((both - dense).mean()), "excess": interval.difference}
        line |= {"low": interval.low, "high": interval.high, "called": called(row["method"], row["compensation"])}
        found.append(line)
    return found


def _losses(rows: Rows, model: Mapping[str, Any], precision: str) -> NDArray[np.float64]:
    names = ("method", "ratio", "compensation")
    for row in rows:
        if row["precision"] == precision and all(row[name] == model[name] for name in names):
            return np.asarray(row["losses"], dtype=np.float64)
    raise ValueError(f"{model['method']}: expected precision {precision} among the rows")


def verdict(tables: Mapping[str, Sequence[Line]], _rows: Rows, _values: Mapping[str, Any]) -> list[str]:
    """Say at each precision whether the damages add up, then which models are worth their bytes."""
    sentences = []
    for precision in dict.fromkeys(line["precision"] for line in tables["sums"]):
        mine = [line for line in tables["sums"] if line["precision"] == precision]
        found: dict[str, list[str]] = {"worse": [], "better": [], "": []}
        for line in mine:
            how = stands(line["low"], line["high"])
            found[how].append(f"{line['called']} {line['ratio']:g} ({line['excess']:+.3f})")
        apart = f"{len(found[''])} of {len(mine)}"
        sentence = f"{precision} costs the dense model {mine[0]['of_quantising']:+.3f} nats a token; with pruning, the "
        sentence += f"damage of both is not significantly (95 %) apart from their sum in {apart}"
        sentence += f", significantly more in {', '.join(found['worse'])}" if found["worse"] else ""
        sentence += f", significantly less in {', '.join(found['better'])}" if found["better"] else ""
        sentences.append(f"{sentence}.")
    front = sorted((line for line in tables[""] if line["on_front"]), key=lambda line: -line["bytes"])
    told = [f"{x['called']} {x['ratio']:g} {x['precision']} ({x['megabytes']:.0f} MB)" for x in front]
    return [*sentences, f"No other has as little perplexity in as few bytes as: {', '.join(told)}."]
