"""lm-eval's results as a file: its own JSON, less what changes from run to run, and one metric of each task.

Left out: dates, timings, the host's description, git hashes of the working directory, texts of the samples (their
hashes stay) and the folder in which a task's files lay.
"""

import math
from collections.abc import Mapping
from typing import Any

_KEPT = (
    "results",
    "groups",
    "group_subtasks",
    "configs",
    "versions",
    "n-shot",
    "higher_is_better",
    "n-samples",
    "lm_eval_version",
    "transformers_version",
    "max_length",
)
_KEPT_CONFIG = (
    "model_num_parameters",
    "model_dtype",
    "limit",
    "bootstrap_iters",
    "random_seed",
    "numpy_seed",
    "torch_seed",
    "fewshot_seed",
)
_TEXTS_OF_SAMPLE = ("doc", "target", "arguments", "resps", "filtered_resps", "metrics")


def deterministic(raw: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Return what of lm-eval's results depends on model, tasks and versions only, as JSON values.

    Args:
        raw: The value of `simple_evaluate` with logged samples.
        folder: Temporary directory whose name is cut out of the texts.
    """
    kept = {key: raw[key] for key in _KEPT if key in raw}
    kept["config"] = {key: raw["config"][key] for key in _KEPT_CONFIG if key in raw["config"]}
    kept["samples"] = {
        task: [{key: value for key, value in sample.items() if key not in _TEXTS_OF_SAMPLE} for sample in samples]
        for task, samples in raw["samples"].items()
    }
    return _plain(kept, folder)


def headline_metrics(raw: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return one metric a task or group: `acc` where there is one, else the first it lists.

    Returns:
        {"metric", "value", "stderr" (None if lm-eval has none), "items" (None for a group)} by name.
    """
    headlines = {}
    for name, result in raw["results"].items():
        metrics = {key: value for key, value in result.items() if _is_metric(key, value)}
        if not metrics:  # a group without an aggregate
            continue
        key = next((key for key in metrics if key.partition(",")[0] == "acc"), next(iter(metrics)))
        metric, _, filter_name = key.partition(",")
        stderr = result.get(f"{metric}_stderr,{filter_name}")
        headlines[name] = {
            "metric": metric,
            "value": metrics[key],
            "stderr": stderr if isinstance(stderr, float) else None,
            "items": raw["n-samples"].get(name, {}).get("effective"),
        }
    return headlines


def _is_metric(key: str, value: Any) -> bool:
    return "," in key and "_stderr," not in key and isinstance(value, int | float)


def _plain(value: Any, folder: str) -> Any:
    """Return JSON values: NaN and infinity as text, other objects by their name, `folder` cut out."""
    if hasattr(value, "item") and not isinstance(value, str):  # a NumPy scalar
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): _plain(item, folder) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        items = sorted(value, key=str) if isinstance(value, set) else value
        return [_plain(item, folder) for item in items]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bool | int) or value is None:
        return value
    if callable(value):  # its repr has an address
        return getattr(value, "__qualname__", type(value).__name__)
    return str(value).replace(f"{folder}/", "")
