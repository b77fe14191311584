"""Step: KL(dense‖pruned) of every candidate's plan on the held-out batch; the smallest wins."""

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from torch import Tensor

from nirvana.device import resolve_device
from nirvana.divergence import kl_divergence
from nirvana.errors import InputError
from nirvana.files import atomic_file, sha256_file, write_json
from nirvana.plan import from_ranges, to_ranges
from nirvana.walk import Execution, Hidden, Stack, final_hidden_states
from nirvana.weights import model_digest
from tasks.corpus.token_files import read_ids
from tasks.estimates.way_of_computing import chosen_way
from tasks.unit_saliency import allocate_as_asked, candidate_files, read_unit_saliency
from tasks.workers.candidates import CACHE, candidate_key, forget, run_jobs, value_of
from tasks.workers.jobs import Job, Progress

if TYPE_CHECKING:
    from tasks.params import Params


def run(params: "Params", inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> None:
    """Write the KL of every candidate and the selection: winner, mean, standard deviation and margin."""
    device = resolve_device(params.runtime.device)
    architecture = Stack.open(inputs["model"]).architecture
    digest, heldout = model_digest(inputs["model"]), sha256_file(inputs["heldout"])
    scored = candidate_files(inputs["unit_saliency"])
    way = chosen_way(params, inputs["model"], read_ids(inputs["heldout"]), device, len(scored))
    jobs = []
    for index, file in enumerate(scored):
        # allocated here, before any forward: a ratio that cannot be reached is an error at once
        keep = allocate_as_asked(architecture, read_unit_saliency(file), params)
        ranges = {name: to_ranges(indices) for name, indices in keep.items()}
        key = candidate_key(
            "kl_divergence",
            model=digest,
            heldout=heldout,
            keep=ranges,
            threads=params.compute.threads,
            device=device.type,
        )
        files = {name: inputs[name] for name in ("model", "heldout")}
        arguments = {"digests": (digest, heldout), "keep": ranges, "execution": way.execution}
        jobs.append(Job(index, CACHE / f"{key}.json", files, arguments))
    run_jobs(_score, jobs, lambda value: _read(value) is not None, params.runtime, way.workers, device, "score pool")
    scores = [_read(value_of(job)) for job in jobs]
    _write(np.array(scores, dtype=np.float64), outputs)
    forget(jobs)


@functools.lru_cache(maxsize=1)
def _open(
    model: Path, heldout: Path, digests: tuple[str, str], device: str, execution: Execution
) -> tuple[Stack, tuple[Tensor, ...], Hidden]:
    """Open both once a process; `digests`, for a worker that outlives the files at these paths."""
    stack = Stack.open(model, device, execution)
    ids = read_ids(heldout)
    return stack, ids, final_hidden_states(stack, ids)


def _score(job: Job, device: str, progress: Progress) -> bytes:
    given = job.arguments
    stack, ids, dense = _open(job.files["model"], job.files["heldout"], given["digests"], device, given["execution"])
    sites = {site.name: site for site in stack.architecture.sites()}
    keep = {name: from_ranges(text, sites[name].units) for name, text in given["keep"].items()}
    value = kl_divergence(stack, keep, ids, dense)
    if not math.isfinite(value):
        raise InputError(
            f"candidate {job.index}: expected a finite KL, got {value}; the model's weights or activations overflow"
        )
    progress(1)
    return json.dumps({"kl_divergence": value}).encode()


def _read(content: bytes) -> float | None:
    try:
        value = json.loads(content)["kl_divergence"]
    except (ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, float) and math.isfinite(value) else None


def _write(scores: np.ndarray, outputs: Mapping[str, Path]) -> None:
    selected = int(scores.argmin())
    ranked = np.sort(scores)
    table = pd.DataFrame({"candidate": np.arange(len(scores)), "kl_divergence": scores})
    table["selected"] = (table["candidate"] == selected).astype(int)
    with atomic_file(outputs["kl_scores"]) as temporary:
        table.to_csv(temporary, index=False)
    write_json(
        outputs["selection"],
        {
            "selected": selected,
            "kl_divergence": float(scores[selected]),
            "mean": float(scores.mean()),
            "standard_deviation": float(scores.std(ddof=1)) if len(scores) > 1 else 0.0,
            "margin": float(ranked[1] - ranked[0]) if len(scores) > 1 else None,
            "scores": [float(score) for score in scores],
        },
    )
