"""Run the parts of the kernel study, several at a time."""

import json
from pathlib import Path
from typing import Any

from nirvana.files import read_json
from studies.ntk.study import CACHE, METHODS, Settings, curve, kernel_rows, subject_of
from studies.parts import run_parts
from studies.tiny_model import RECORD, read_text
from tasks.workers.jobs import Job, Progress


def measure(settings: Settings, corpus: Path, processes: int) -> dict[str, list[dict[str, Any]]]:
    """Train, prune, measure and fine-tune; what an earlier run finished is not computed again.

    Args:
        settings: What is measured.
        corpus: What step fetch_corpus wrote.
        processes: Of one thread each.

    Returns:
        `models`, one training record a seed; `kernels`, one row a seed, method and ratio; `curves`, one a seed and
        method, and one of the dense model.
    """
    read_text(corpus, settings.recipe.vocabulary, CACHE)  # once, not in every process
    models = [{"settings": settings, "corpus": corpus, "seed": seed} for seed in range(settings.seeds)]
    training = [model | {"kind": "model", "method": ""} for model in models]
    records = run_parts(do_part, training, CACHE, "training", processes)
    kinds = [("kernel", method) for method in METHODS] + [("curve", method) for method in ("dense", *METHODS)]
    parts = [model | {"kind": kind, "method": method} for model in models for kind, method in kinds]
    values = run_parts(do_part, parts, CACHE, "pruning and fine-tuning", processes)
    found = [(part["kind"], value) for part, value in zip(parts, values, strict=True)]
    return {
        "models": records,
        "kernels": [row for kind, rows in found if kind == "kernel" for row in rows],
        "curves": [points for kind, points in found if kind == "curve"],
    }


def do_part(job: Job, device: str, progress: Progress) -> bytes:
    """Do one job of the study; return its value as JSON."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading a megabyte
    settings, seed, corpus, kind, method = (
        job.arguments[name] for name in ("settings", "seed", "corpus", "kind", "method")
    )
    value: Any
    if kind == "model":
        value = read_json(subject_of(settings, seed, corpus).directory / RECORD)
    elif kind == "kernel":
        value = kernel_rows(settings, seed, corpus, method)
    else:
        value = curve(settings, seed, corpus, method)
    return json.dumps(value).encode()
