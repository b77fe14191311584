"""Plans as tables for people. Everything that comes out of a file is shown as plain text, never as markup."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nirvana.cli.one_line import printable
from nirvana.plan import MODULES, Plan
from nirvana.plan_diff import PlanDifference
from nirvana.plan_summary import summarise
from nirvana.ranges import to_ranges

_BAR = 10  # characters
_LONGEST_RANGES = 14  # characters


def show(path: Path, plan: Plan) -> None:
    """Print what a plan removes."""
    console = Console(highlight=False)
    content = summarise(plan)
    facts = _table("", "")
    facts.show_header = False
    model = content["model"]
    facts.add_row("plan", _text(path))
    facts.add_row("model", _text(f"{model['model_type']}, {model['num_layers']} layers, {_digest(model['digest'])}"))
    facts.add_row("calibration", _text(_digest(content["calibration"]["digest"])))
    facts.add_row("compensation", _text(_compensation(content["compensation"])))
    if content["allocation"]:
        facts.add_row("allocation", _text(", ".join(f"{key} {_value(v)}" for key, v in content["allocation"].items())))
    facts.add_row("parameters", _text(", ".join(f"{key} {_value(v)}" for key, v in content["parameters"].items())))
    modules = _table("module", ">requested", ">achieved", ">units kept", ">weights kept")
    for module in (*MODULES, "total"):
        row = content["modules"][module]
        requested = "" if row["requested_ratio"] is None else f"{row['requested_ratio']:.2%}"
        units = f"{row['kept_units']:,} of {row['units']:,}"
        weights = f"{_millions(row['kept_weights'])} of {_millions(row['weights'])} M"
        modules.add_row(module, requested, f"{row['achieved_ratio']:.2%}", units, weights)
    for table in (facts, modules, _layers(content["sites"], console.options.ascii_only)):
        console.print(table, "")


def _layers(sites: list[dict[str, Any]], ascii_only: bool) -> Table:
    """Return one row a layer, one column a kind of site: `layers.3.kv_group` is kind `kv_group` in row `layers.3`."""
    rows: dict[str, dict[str, Text]] = {}
    for site in sites:
        row, _, kind = site["name"].rpartition(".")
        rows.setdefault(row, {})[kind] = _bar(site["kept_units"], site["units"], ascii_only)
    kinds = list(dict.fromkeys(kind for cells in rows.values() for kind in cells))
    table = _table("kept of", *kinds)
    for row, cells in rows.items():
        table.add_row(_text(row), *(cells.get(kind, "") for kind in kinds))
    return table


def _bar(kept: int, units: int, ascii_only: bool) -> Text:
    filled = max(1, kept * _BAR // units)  # full only where nothing leaves
    full, empty = ("#", ".") if ascii_only else ("█", "░")
    width = len(str(units))
    return Text(f"{full * filled}{empty * (_BAR - filled)} {kept:>{width}}/{units}", no_wrap=True)


def diff(path_a: Path, path_b: Path, difference: PlanDifference) -> None:
    """Print what differs between two plans."""
    console = Console(highlight=False)
    if difference.equal:
        console.print(_text(f"equal: {path_a} and {path_b}"), soft_wrap=True)
        return
    facts = _table("", "")
    facts.show_header = False
    facts.add_row("A", _text(path_a))
    facts.add_row("B", _text(path_b))
    console.print(facts, "")
    if difference.settings:
        settings = _table("setting", "A", "B")
        for key, values in difference.settings.items():
            settings.add_row(_text(key), *(_text(_side(key, values, side)) for side in ("a", "b")))
        console.print(settings, "")
    modules = _table("module", ">achieved A", ">achieved B", ">kept in both", ">A only", ">B only", ">overlap")
    for module in (*MODULES, "total"):
        ratios = [f"{ratio:.2%}" for ratio in difference.achieved_ratio[module]]
        counts = [f"{count:,}" for count in difference.kept(module)]
        modules.add_row(module, *ratios, *counts, f"{difference.overlap(module):.4f}")
    console.print(modules, "")
    sites = _table("site", ">in both", "A only", "B only")
    for site in difference.differing_sites:
        sites.add_row(_text(site.name), str(site.kept_in_both), _few(site.only_in_a), _few(site.only_in_b))
    if difference.differing_sites:
        console.print(sites)


def _few(indices: NDArray[np.int64]) -> str:
    """Return how many indices there are, and the first of them; --json has all."""
    text = to_ranges(indices[:_LONGEST_RANGES])
    if len(text) > _LONGEST_RANGES or len(indices) > _LONGEST_RANGES:
        text = text[:_LONGEST_RANGES].rpartition(",")[0] + ",..."
    return f"{len(indices)}: {text}" if len(indices) else "0"


def _table(*headings: str) -> Table:
    """Return an empty table; `>` before a heading sets its column flush right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in headings:
        right = heading.startswith(">")
        table.add_column(heading.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    return table


def _side(key: str, values: Mapping[str, Any], side: str) -> str:
    if side not in values:
        return "-"
    return _digest(values[side]) if key.endswith("digest") else _value(values[side])


def _compensation(compensation: Mapping[str, Any] | None) -> str:
    if compensation is None:
        return "none"
    return f"ridge {compensation['ridge']:g}, fitted on {_digest(compensation['calibration_digest'])}"


def _digest(digest: object) -> str:
    """Return enough of a digest to tell it from others; --json has all of it."""
    algorithm, colon, digits = str(digest).rpartition(":")
    return f"{algorithm}{colon}{digits[:16]}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}" if count >= 50_000 else f"{count / 1e6:.2g}"


def _text(value: object) -> Text:
    return Text(printable(value))


def _value(value: Any) -> str:
    """Return a setting as one line; text without quotes, everything else as JSON."""
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value)
