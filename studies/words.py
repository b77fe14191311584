"""What lines say in words: who stands where, in one form for every study; and what MLflow keeps of them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from studies.lines import REFERENCE, Line, worded
from studies.measure import UNREACHABLE
from studies.tracking import Series
from studies.variants import DENSE

_LISTED = 4  # names a sentence has room for


def stands(low: float, high: float) -> str:
    """Say how a 95 % interval of what is worse above 0 stands to 0."""
    return "worse" if low > 0 else "better" if high < 0 else ""


def verdict(lines: Sequence[Line], how: Mapping[str, Any]) -> list[str]:
    """Return a sentence a group of lines: how the reference stands to the others, and which has the least of a measure.

    Args:
        lines: Of one table.
        how: Of a spec: `group`, `label` and `says` are templates; `judge` names a difference to the reference and its
            interval; `least` a column, if the variant of the least of it (`among` those of these values) is to be told;
            `rivals` a column, if of what shares it only the one of least difference is told, and nothing that shares
            the reference's.
    """
    groups: dict[str, list[Line]] = {}
    for line in lines:
        if line.get("method") != DENSE:
            groups.setdefault(worded(how["group"], line), []).append(line)
    return [f"{name}: {_sentence(members, how)}." for name, members in groups.items()]


def _sentence(members: Sequence[Line], how: Mapping[str, Any]) -> str:
    reached = [line for line in members if UNREACHABLE not in line]
    out = [worded(how["label"], line) for line in members if UNREACHABLE in line]
    parts = []
    ours = next((line for line in reached if line[REFERENCE]), None)
    if ours is not None:
        parts.append(f"{_named(ours, how)}{_standing(ours, reached, how)}")
    among = [line for line in reached if all(line.get(name) == value for name, value in how.get("among", {}).items())]
    if "least" in how and among:
        # of equals the reference
        best = min(among, key=lambda line: (line[how["least"]], not line[REFERENCE]))
        words = f"{how['least']} is least with {_named(best, how)}"
        parts.append(words if best[REFERENCE] else f"{words}, whose difference is {_difference(best, how)}")
    parts += [f"out of reach: {', '.join(out)}"] if out else []
    return "; ".join(parts) or "nothing was measured"


def _named(line: Line, how: Mapping[str, Any]) -> str:
    return f"{worded(how['label'], line)} ({worded(how['says'], line)})"


def _difference(line: Line, how: Mapping[str, Any]) -> str:
    difference, low, high = (line[name] for name in how["judge"])
    how_sure = stands(low, high)
    said = f"significantly {how_sure} (95 %)" if how_sure else "not significant"
    return f"{difference:+.3f} [{low:+.3f}, {high:+.3f}], {said}"


def _standing(ours: Line, reached: Sequence[Line], how: Mapping[str, Any]) -> str:
    others = [line for line in reached if line is not ours]
    if "rivals" in how:
        column = how["rivals"]
        each = sorted((line for line in others if line[column] != ours[column]), key=lambda x: -x[how["judge"][0]])
        others = list({line[column]: line for line in each}.values())
    found: dict[str, list[str]] = {"worse": [], "better": [], "": []}
    for line in others:
        found[stands(*(line[name] for name in how["judge"][1:]))].append(worded(how["label"], line))
    if not others:
        return ""
    said = f" is significantly better (95 %) than {len(found['worse'])} of {len(others)} others"
    said += f", not significantly apart from {_listed(found[''])}" if found[""] else ""
    return said + (f", significantly worse than {_listed(found['better'])}" if found["better"] else "")


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def series_of(lines: Sequence[Mapping[str, Any]], how: Mapping[str, Any]) -> dict[str, list[Series]]:
    """Return what MLflow takes, by child.

    Args:
        lines: Of one table.
        how: Of a spec: `child`, a template; `step`, a column, and `scale`, what makes a whole number of it; `metrics`,
            columns; `prefix`, a template that begins their names.
    """
    result: dict[str, dict[str, list[tuple[int, float]]]] = {}
    scale = how.get("scale", 1)
    unit = {100: "_percent", 1000: "_per_mille"}.get(scale, "")
    for line in lines:
        child = result.setdefault(worded(how["child"], line), {})
        for column in how["metrics"]:
            if line.get(column) is None or line.get(how["step"]) is None:
                continue
            name = f"{worded(how.get('prefix', ''), line)} {column}_by_{how['step']}{unit}".strip()
            name = re.sub(r"[^\w.-]+", "_", name)
            child.setdefault(name, []).append((round(scale * line[how["step"]]), float(line[column])))
    return {child: [Series(metric, points) for metric, points in metrics.items()] for child, metrics in result.items()}
