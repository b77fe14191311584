"""Step: what units of each candidate are scored from. Gradients themselves are never stored.

For `saliency.method: nirvana` these are channel sums, for other methods the units' own scores.
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

# a method's code is found by its name: imported here so that it is a dependency of this step
from nirvana.methods import fisher, flap, llm_pruner, lm_loss, magnitude, nirvana, random, wanda_sp  # noqa: F401
from nirvana.methods.method import Method, Scoring
from nirvana.methods.registry import method_named
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
    """Write `candidate_NNN.safetensors` for each candidate: one vector a weight slot, or a site."""
    device = resolve_device(params.runtime.device)
    method = method_named(params.saliency.method)
    seed = params.calibration.seed if method.seeded else None
    expected = _expected_sizes(inputs["model"], method)
    candidates = read_ids(inputs["candidates"])
    digest = model_digest(inputs["model"])
    work = {"microbatch": params.saliency.microbatch, "needs": method.needs, "draws": params.saliency.draws}
    way = chosen_way(params, inputs["model"], candidates, device, len(candidates[0]), **work)
    jobs = []
    for index in range(len(candidates[0])):
        key = candidate_key(
            "channel_saliency",
            model=digest,
            ids=[part[index].tolist() for part in candidates],
            method=method.name,
            draws=params.saliency.draws if method.seeded else None,
            seed=seed,
            microbatch=params.saliency.microbatch,
            threads=params.compute.threads,
            device=device.type,
        )
        files = {name: inputs[name] for name in ("model", "candidates")}
        arguments = {
            "digest": digest,
            "method": method.name,
            "seed": seed or 0,
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
    method = method_named(given["method"])
    share = 1 / (max(1, method.walks) * stack.num_layers)
    if not method.by_channel:
        scoring = Scoring(
            given["microbatch"], given["seed"], given["draws"], given["memory"], lambda layer: progress(share)
        )
        return save({name: each.contiguous() for name, each in sorted(method.scorer(stack, ids, scoring).items())})
    result = channel_saliency(stack, ids, given["microbatch"], lambda layer: progress(share), given["memory"])
    # safetensors writes keys in a stable order: same values, same bytes
    return save(dict(sorted(result.sums.items())), {"objective": repr(result.objective)})


def _expected_sizes(model: Path, method: Method) -> dict[str, int]:
    stack = Stack.open(model)
    sites, weights = stack.architecture.sites(), stack.weights
    if method.needs_projections:
        output_projections(stack.architecture)  # a family without them is refused before any forward
    if not method.by_channel:
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
