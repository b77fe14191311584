"""Step: one backward walk a candidate -> what units are scored from. Gradients themselves are never stored.

For `saliency.method: nirvana` these are channel sums, for `fisher` the units' own values.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from nirvana.device import resolve_device
from nirvana.files import atomic_directory
from nirvana.fisher import mask_fisher
from nirvana.projections import output_projections
from nirvana.saliency import channel_key, channel_saliency
from nirvana.walk import Execution, Stack
from nirvana.weights import model_digest
from tasks.corpus.token_files import read_ids
from tasks.estimates.way_of_computing import chosen_way
from tasks.workers.candidates import CACHE, candidate_key, forget, run_jobs, value_of
from tasks.workers.jobs import Job, Progress

if TYPE_CHECKING:
    from tasks.params import Params


def run(params: "Params", inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> None:
    """Write `candidate_NNN.safetensors` for each candidate: one vector a weight slot, or for `fisher` a site."""
    device = resolve_device(params.runtime.device)
    method = params.saliency.method
    expected = _expected_sizes(inputs["model"], method)
    candidates = read_ids(inputs["candidates"])
    digest = model_digest(inputs["model"])
    work = {"microbatch": params.saliency.microbatch, "saliency": method, "draws": params.saliency.draws}
    way = chosen_way(params, inputs["model"], candidates, device, len(candidates[0]), **work)
    jobs = []
    for index in range(len(candidates[0])):
        key = candidate_key(
            "channel_saliency",
            model=digest,
            ids=[part[index].tolist() for part in candidates],
            method=method,
            draws=params.saliency.draws if method == "fisher" else None,
            microbatch=params.saliency.microbatch,
            threads=params.compute.threads,
            device=device.type,
        )
        files = {name: inputs[name] for name in ("model", "candidates")}
        arguments = {
            "digest": digest,
            "method": method,
            "draws": params.saliency.draws,
            "microbatch": params.saliency.microbatch,
            "execution": way.execution,
            "memory": way.memory,
        }
        jobs.append(Job(index, CACHE / f"{key}.safetensors", files, arguments))
    run_jobs(
        _collect,
        jobs,
        lambda value: _is_valid(value, expected),
        params.runtime,
        way.workers,
        device,
        "collect gradients",
    )
    with atomic_directory(outputs["channel_saliency"]) as directory:
        for job in jobs:
            (directory / f"candidate_{job.index:03d}.safetensors").write_bytes(value_of(job))
    forget(jobs)


@functools.lru_cache(maxsize=1)
def _open(model: Path, digest: str, device: str, execution: Execution) -> Stack:
    """Open a model once a process; `digest`, for a worker that outlives the model at that path."""
    return Stack.open(model, device, execution)


def _collect(job: Job, device: str, progress: Progress) -> bytes:
    given = job.arguments
    stack = _open(job.files["model"], given["digest"], device, given["execution"])
    ids = tuple(part[job.index] for part in read_ids(job.files["candidates"]))
    share = 1 / (2 * stack.num_layers)
    if given["method"] == "fisher":
        values = mask_fisher(stack, ids, given["microbatch"], given["draws"], on_layer=lambda layer: progress(share))
        return save(dict(sorted(values.items())))
    result = channel_saliency(stack, ids, given["microbatch"], lambda layer: progress(share), given["memory"])
    # safetensors writes keys in a stable order: same values, same bytes
    return save(dict(sorted(result.sums.items())), {"objective": repr(result.objective)})


def _expected_sizes(model: Path, method: str) -> dict[str, int]:
    stack = Stack.open(model)
    sites, weights = stack.architecture.sites(), stack.weights
    if method == "fisher":
        output_projections(stack.architecture)  # a family without them is refused before any forward
        return {site.name: site.units for site in sites}
    slots = [slot for site in sites for slot in site.weight_slots]
    return {channel_key(slot): weights.shape(slot.parameter)[slot.dim] for slot in slots}


def _is_valid(value: bytes, expected: Mapping[str, int]) -> bool:
    """Tell whether a cached value is whole: all vectors, of the right size, finite."""
    try:
        found = load(value)
    except SafetensorError:
        return False
    return {name: len(v) for name, v in found.items()} == expected and all(
        bool(torch.isfinite(vector).all()) for vector in found.values()
    )
