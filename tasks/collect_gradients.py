"""Step: one backward walk a candidate -> channel saliency. Gradients themselves are never stored."""

import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from nirvana.device import resolve_device
from nirvana.files import atomic_directory, atomic_file
from nirvana.saliency import channel_key, channel_saliency
from nirvana.walk import Stack
from nirvana.weights import model_digest
from tasks.candidates import CACHE, Job, Progress, candidate_key, forget, run_jobs

if TYPE_CHECKING:
    from tasks.params import Params


def run(params: "Params", inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> None:
    """Write `candidate_NNN.safetensors` for each candidate: one vector a weight slot, the objective as metadata."""
    device = resolve_device(params.runtime.device)
    expected = _expected_sizes(inputs["model"])
    candidates = load_file(inputs["candidates"])["input_ids"]
    digest = model_digest(inputs["model"])
    jobs = []
    for index, ids in enumerate(candidates):
        key = candidate_key(
            "channel_saliency",
            model=digest,
            ids=ids.tolist(),
            method=params.saliency.method,
            microbatch=params.saliency.microbatch,
            threads=params.compute.threads,
            device=device.type,
        )
        arguments = {
            "model": str(inputs["model"]),
            "candidates": str(inputs["candidates"]),
            "microbatch": params.saliency.microbatch,
            "device": str(device),
        }
        jobs.append(Job(index, CACHE / f"{key}.safetensors", arguments))
    run_jobs(_collect, jobs, lambda job: _is_valid(job.result, expected), params.runtime.workers, "collect gradients")
    with atomic_directory(outputs["channel_saliency"]) as directory:
        for job in jobs:
            shutil.copyfile(job.result, directory / f"candidate_{job.index:03d}.safetensors")
    forget(jobs)


@functools.lru_cache(maxsize=1)
def _open(model: str, device: str) -> Stack:
    return Stack.open(model, device)


def _collect(job: Job, progress: Progress) -> None:
    stack = _open(job.arguments["model"], job.arguments["device"])
    ids = load_file(job.arguments["candidates"])["input_ids"][job.index]
    share = 1 / (2 * stack.num_layers)
    result = channel_saliency(stack, ids, job.arguments["microbatch"], on_layer=lambda layer: progress(share))
    with atomic_file(job.result) as temporary:
        # safetensors writes keys in a stable order: same values, same bytes
        save_file(dict(sorted(result.sums.items())), temporary, {"objective": repr(result.objective)})


def _expected_sizes(model: Path) -> dict[str, int]:
    slots = [slot for site in Stack.open(model).architecture.sites() for slot in site.weight_slots]
    weights = Stack.open(model).weights
    return {channel_key(slot): weights.shape(slot.parameter)[slot.dim] for slot in slots}


def _is_valid(path: Path, expected: Mapping[str, int]) -> bool:
    """Tell whether a cached file is whole: all vectors, of the right size, finite."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError):
        return False
    return {name: len(v) for name, v in found.items()} == expected and all(
        bool(torch.isfinite(vector).all()) for vector in found.values()
    )
