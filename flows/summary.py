"""The table at the end of a run: dense beside pruned, from the files that the steps wrote."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nirvana.errors import InputError
from nirvana.files import read_json

Number = float | int | None


@dataclass(frozen=True)
class StepResult:
    """What became of one step: `state` is Completed or Cached, `seconds` wall-clock."""

    name: str
    state: str
    seconds: float


def print_summary(results: Sequence[StepResult], seconds: float, root: Path | str = ".") -> None:
    """Print the results table, where things are, and what each step took."""
    console = Console()
    try:
        console.print(_results_table(Path(root)))
        console.print(_places(Path(root)), highlight=False)
    except InputError:  # the run stopped before the files existed, by --until
        pass
    except (LookupError, TypeError, ValueError, AttributeError):
        console.print("reports/ holds other files than the steps write: no table.", highlight=False)
    console.print(_steps_table(results))
    ran = [result.name for result in results if result.state == "Completed"]
    if all(result.state == "Cached" for result in results):
        console.print("Nothing changed: every step was up to date or came back from the cache.", highlight=False)
    console.print(f"main job: {seconds:.1f} s, {len(ran)} of {len(results)} steps ran", highlight=False)


def _results_table(root: Path) -> Table:
    reports = root / "reports"
    dense, pruned = read_json(reports / "evaluation_dense.json"), read_json(reports / "evaluation.json")
    benchmark = read_json(reports / "benchmark.json")
    plan, selection = read_json(root / "artifacts/plan.json"), read_json(root / "artifacts/selection.json")
    measured = read_json(reports / "divergence.json")["kl_divergence"]
    recovered = read_json(reports / "recovery.json")["tokens"]
    title = f"Pruned at a requested ratio of {plan['allocation']['pruning_ratio']:.3g}"
    if recovered:
        title += f", fine-tuned on {recovered:,} tokens"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in ("dense", "pruned", "pruned / dense"):
        table.add_column(heading, justify="right")

    def row(label: str, show: Callable[[Any], str], before: Number, after: Number, ratio: bool = True) -> None:
        quotient = f"{after / before:.3f}" if ratio and before and after is not None else ""
        table.add_row(label, *("" if value is None else show(value) for value in (before, after)), quotient)

    for label, key, show in _BENCHMARK_ROWS[:1]:
        row(label, show, benchmark["dense"].get(key), benchmark["pruned"].get(key))
    for module in ("total", "attention", "mlp"):
        row(f"achieved ratio, {module}", _share, None, plan["achieved_ratio"][module])
    row("token perplexity", _short, dense["token_perplexity"], pruned["token_perplexity"])
    row("KL(dense‖pruned), nats", _short, None, selection["kl_divergence"] if measured is None else measured)
    for task in pruned["tasks"]:
        before, after = dense["tasks"].get(task), pruned["tasks"][task]
        table.add_row(f"{task} ({after['metric']})", _scored(before), _scored(after), "")
    for label, key, show in _BENCHMARK_ROWS[1:]:
        row(label, show, benchmark["dense"].get(key), benchmark["pruned"].get(key))
    if benchmark.get("warning"):
        table.caption = str(benchmark["warning"])
    return table


def _places(root: Path) -> str:
    recovered = read_json(root / "reports/recovery.json")["tokens"]
    lines = [
        f"checkpoint  artifacts/{'recovered' if recovered else 'checkpoint'}",
        "plan        artifacts/plan.json",
        "report      reports/report.html",
    ]
    try:
        run = read_json(root / "reports/mlflow_run.json")
        lines.append(f"MLflow run  {run['run_id']} at {run['tracking_uri']}")
    except InputError:
        pass
    return "\n".join(lines)


def _steps_table(results: Sequence[StepResult]) -> Table:
    table = Table(title="Steps", title_justify="left")
    table.add_column("step")
    table.add_column("state")
    table.add_column("seconds", justify="right")
    for result in results:
        table.add_row(result.name, result.state, f"{result.seconds:.1f}")
    return table


def _short(value: float) -> str:
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _share(value: float) -> str:
    return f"{value:.4f}"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.1f} MB"


def _scored(task: Mapping[str, Any] | None) -> str:
    if task is None:
        return ""
    spread = f" ± {task['stderr']:.3f}" if isinstance(task.get("stderr"), int | float) else ""
    return f"{task['value']:.3f}{spread}"


_BENCHMARK_ROWS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("parameters", "parameters", _whole),
    ("prefill, tokens a second", "prefill_tokens_per_second", _short),
    ("decode, tokens a second", "decode_tokens_per_second", _short),
    ("peak memory", "peak_bytes", _megabytes),
    ("checkpoint size", "checkpoint_bytes", _megabytes),
)
