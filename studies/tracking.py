"""A study as MLflow runs: a parent with what was asked for and what came out, a child a method or variant."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.tracking.mlflow_store import open_store

DIGEST_TAG = "nirvana.study_digest"


@dataclass(frozen=True)
class Series:
    """One metric of one child: values at steps (a ratio in percent, an optimiser step)."""

    metric: str
    points: Sequence[tuple[int, float]]


def record_study(
    study: str,
    parameters: Mapping[str, Any],
    children: Mapping[str, Sequence[Series]],
    files: Sequence[Path],
    conclusion: str = "",
) -> str:
    """Record a study once: the same parameters and values again are the same run.

    Args:
        study: Its name.
        parameters: What was asked for; nested mappings become dotted keys.
        children: What came out, by method or variant.
        files: Pictures and tables, kept with the parent.
        conclusion: The parent's description.

    Returns:
        The parent's run id.

    Raises:
        InputError: If the store does not answer.
    """
    from mlflow.entities import Metric, Param

    flat = dict(_flatten(parameters))
    values = {name: [[each.metric, list(each.points)] for each in series] for name, series in children.items()}
    content = json.dumps([study, flat, values], sort_keys=True, default=str)
    digest = hashlib.sha256(content.encode()).hexdigest()
    with open_store() as (client, experiment):
        # a recording that was cut short is not FINISHED, and is made anew
        wanted = f"tags.`{DIGEST_TAG}` = '{digest}' and attributes.status = 'FINISHED'"
        found = client.search_runs([experiment], wanted, max_results=1)
        if found:
            return str(found[0].info.run_id)
        tags = {DIGEST_TAG: digest, "nirvana.study": study, "mlflow.note.content": conclusion}
        parent = client.create_run(experiment, tags=tags, run_name=f"{study} {digest[:7]}").info.run_id
        client.log_batch(parent, params=[Param(key, str(value)) for key, value in flat.items()])
        for file in files:
            client.log_artifact(parent, str(file))
        now = int(time.time() * 1000)
        for name, series in children.items():
            tags = {"mlflow.parentRunId": parent, "nirvana.study": study}
            child = client.create_run(experiment, tags=tags, run_name=f"{study}: {name}").info.run_id
            metrics = [Metric(each.metric, value, now, step) for each in series for step, value in each.points]
            client.log_batch(child, metrics=metrics)
            client.set_terminated(child, "FINISHED")
        client.set_terminated(parent, "FINISHED")
    return str(parent)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in values.items():
        flat += _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return flat
