"""Write reports/report.html: one file that needs no network and no script, pictures first.

The page is a function of the step's inputs, its parameters and the installed libraries: no dates, no paths.
"""

import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nirvana.files import atomic_file, read_json
from nirvana.plan import Plan
from nirvana.plan_summary import requested_rates
from tasks.pictures.plots import COSTS, PALETTE, by_module, figures, is_share, read_rows, title_of, written

if TYPE_CHECKING:
    from tasks.params import Params

TEMPLATE = "report.html.j2"
SECTIONS = (
    "method",
    "model",
    "corpus",
    "calibration",
    "saliency",
    "allocation",
    "compensation",
    "recovery",
    "evaluation",
    "benchmark",
    "compute",
)
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "datasets", "lm_eval", "matplotlib")


def run(params: "Params", inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> None:
    """Write the report.

    Raises:
        InputError: If an input is missing, is not JSON, or does not fit the plan.
    """
    page = render(params, inputs)
    with atomic_file(outputs["report"]) as temporary:
        temporary.write_text(page, encoding="utf-8")


def render(params: "Params", inputs: Mapping[str, Path]) -> str:
    """Return the page's HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(num=num, arrow=arrow, signed=signed, title=title_of)
    names = ("plan", "selection", "divergence", "recovery", "benchmark", "evaluation_dense", "evaluation")
    plan, selection, divergence, recovery, benchmark, dense, pruned = (read_json(inputs[name]) for name in names)
    measured = divergence["kl_divergence"]
    layers = read_rows(inputs["allocation"])
    wide, narrow = (
        {name: themed(svg) for name, svg in figures(inputs, narrow=is_narrow).items()} for is_narrow in (False, True)
    )
    return environment.get_template(TEMPLATE).render(
        name=model_name(params.model.source),
        params=params,
        plan=plan,
        selection=selection,
        divergence=selection["kl_divergence"] if measured is None else measured,
        benchmark=benchmark,
        experts={key: sum(int(row.get(key, 0)) for row in layers) for key in ("experts", "idle_experts")},
        dense=dense,
        pruned=pruned,
        layers=[{key: value if key == "module" else json.loads(value) for key, value in row.items()} for row in layers],
        candidates=read_rows(inputs["kl_scores"]),
        recovery=recovery,
        curve=read_rows(inputs["recovery_curve"]),
        modules=module_ratios(layers, requested_rates(Plan.read(inputs["plan"])), plan["achieved_ratio"]),
        tasks=task_rows(dense["tasks"], pruned["tasks"]),
        costs=COSTS,
        floors={f"{phase}_latency_ms": value for phase, value in benchmark["floor"].items()},
        machine=flat(benchmark["machine"]),
        parameters={section: flat(asdict(getattr(params, section))) for section in SECTIONS},
        libraries={"python": platform.python_version(), **installed(LIBRARIES)},
        wide=wide,
        narrow=narrow,
        palette=PALETTE,
    )


def num(value: float | str | None, kind: str = "", digits: int = 4) -> Markup:
    """Write a number for a reader and keep its exact value beside it, in the `value` of a <data> element."""
    if value is None:
        return Markup("–")
    number = json.loads(value) if isinstance(value, str) else value
    if kind == "exact":
        text = f"{number:,.0f}" if number == int(number) else written(number, "", 5)
    else:
        text = written(number, kind, digits)
    return Markup('<data value="{}">{}</data>').format(json.dumps(number), text)


def arrow(pair: Sequence[float], kind: str = "", digits: int = 4) -> Markup:
    """Write what was and what is; a unit that both have is written once."""
    before, after = (num(value, kind, digits) for value in pair)
    unit = re.compile(r"\N{NO-BREAK SPACE}\S+(?=</data>)")
    if unit.findall(before) == unit.findall(after):
        before = Markup(unit.sub("", before))  # noqa: S704  a part of what num() escaped
    return Markup('{}<span class="arrow"> → </span>{}').format(before, after)


def signed(value: float, digits: int = 1) -> str:
    """Write a difference with its sign, a true minus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def themed(svg: str) -> Markup:
    """Let the page's light or dark theme colour a figure, and drop the namespaces that HTML implies."""
    for name, colour in PALETTE.items():
        svg = svg.replace(colour, f"var(--{name})")
    return Markup(re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg))  # noqa: S704  drawn by us, its texts escaped


def model_name(source: str) -> str:
    """Return the short name of a model source, for the title."""
    scheme, _, rest = source.partition(":")
    if scheme == "hf":
        return rest.partition("@")[0]
    last = rest.rpartition("#")[2].rstrip("/").rpartition("/")[2]
    return last.removesuffix(".gguf") or source


def module_ratios(
    layers: Sequence[Mapping[str, str]], requested: Mapping[str, float], achieved: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return one row a module and one for both: counts, weights, achieved and requested ratio."""
    rows = []
    for module, members in [*by_module(layers).items(), ("total", layers)]:
        sums = {key: sum(int(row[key]) for row in members) for key in ("units", "kept", "weights", "kept_weights")}
        row = {"module": module, "requested": requested.get(module), "achieved": achieved.get(module)}
        rows.append({**row, **sums})
    return rows


def task_rows(dense: Mapping[str, Any], pruned: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row a task that either evaluation has."""
    rows = []
    for name in [*dense, *(name for name in pruned if name not in dense)]:
        before, after = dense.get(name), pruned.get(name)
        known: Any = before or after
        values = [task["value"] for task in (before, after) if task]
        rows.append(
            {
                "name": name,
                "metric": known["metric"],
                "items": known.get("items"),
                "kind": "share" if is_share(known["metric"], *values) else "",
                "dense": before,
                "pruned": after,
            }
        )
    return rows


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested settings to dotted keys, each value as the params file would write it."""
    rows: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows.update(flat(value, f"{prefix}{key}."))
        else:
            rows[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return rows


def installed(libraries: Sequence[str]) -> dict[str, str]:
    """Return the versions of those libraries that are installed."""
    found = {}
    for library in libraries:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
