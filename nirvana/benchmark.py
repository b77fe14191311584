"""Speed of a pruned model beside its dense one, measured in one process, against what its size allows.

The floor of a ratio: prefill is bound by arithmetic, so its latency cannot fall below the ratio of FLOPs; decoding is
bound by reading weights, so its latency cannot fall below the ratio of their bytes. Both are rules of thumb: caches and
kernels that like one shape better than another move a measured ratio to either side.
"""

import platform
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from nirvana.device import available_bytes
from nirvana.footprint import (
    checkpoint_bytes,
    count_parameters,
    decode_weight_bytes,
    fixed_prompt,
    float32_bytes,
    flops_per_token,
    peak_bytes,
)
from nirvana.greedy import decode, prefill
from nirvana.loading import load_model

_PEAK_DECODE_TOKENS = 4
_NOT_ALTERNATED = (
    "not alternated: both models at once would take more than half of the free memory, so a slow spell of the machine "
    "may have hit one of them only"
)


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Attributes:
        batch_size: Prompts at a time.
        prompt_length: Tokens a prompt, prefill.
        decode_tokens: Tokens decoded after each prompt.
        repeats: Timed rounds; the median counts.
        warmup: Rounds before them that are not timed.
    """

    batch_size: int
    prompt_length: int
    decode_tokens: int
    repeats: int
    warmup: int


@dataclass(frozen=True)
class Latency:
    """Medians: of a whole prefill, and of one decoded token (of each prompt of the batch)."""

    prefill_ms: float
    decode_ms: float


def benchmark(
    dense: Path | str, pruned: Path | str, workload: Workload, device: torch.device
) -> dict[str, dict[str, Any] | str | None]:
    """Measure two checkpoints and compare them, in turns where both fit into memory, else one after the other.

    Args:
        dense: Checkpoint directory of the dense model.
        pruned: Checkpoint directory of the pruned model.
        workload: What is timed.
        device: Where.

    Returns:
        "dense" and "pruned": figures by name; "ratio": pruned / dense of each; "floor": the least latency ratio to
        hope for; "warning": a line if pruning made nothing faster or the models did not take turns, else None;
        "machine": where it was measured.
    """
    directories = {"dense": dense, "pruned": pruned}
    peaks = {
        # before the models are loaded here, so that they do not crowd it
        name: peak_bytes(directory, device, workload.batch_size, workload.prompt_length, _PEAK_DECODE_TOKENS)
        for name, directory in tqdm(directories.items(), desc="peak memory", unit="model")
    }
    together = _fit_together(directories.values(), device)
    figures: dict[str, dict[str, float]] = {}
    for names in [list(directories)] if together else [[name] for name in directories]:
        figures |= _measure({name: directories[name] for name in names}, workload, device)
    for name, peak in peaks.items():
        figures[name]["peak_bytes"] = peak
    compared = compare(figures["dense"], figures["pruned"])
    if not together:
        compared["warning"] = "; ".join(filter(None, [_NOT_ALTERNATED, compared["warning"]]))
    return {**figures, **compared, "machine": machine_of(device)}


def _measure(
    directories: Mapping[str, Path | str], workload: Workload, device: torch.device
) -> dict[str, dict[str, float]]:
    """Return the sizes and speeds of models that take turns; they are freed on return."""
    models = {name: load_model(directory, device) for name, directory in directories.items()}
    latencies = measure_latencies(models, workload)
    return {
        name: {
            "parameters": count_parameters(model),
            "checkpoint_bytes": checkpoint_bytes(directories[name]),
            "flops_per_token": flops_per_token(model.config, workload.batch_size, workload.prompt_length),
            "weight_bytes_per_token": decode_weight_bytes(model),
        }
        | speeds(latencies[name], workload)
        for name, model in models.items()
    }


def _fit_together(directories: Iterable[Path | str], device: torch.device) -> bool:
    """Tell whether all models fit into half of the memory at hand: the other half is for what computing takes."""
    return sum(map(float32_bytes, directories)) <= available_bytes(device) / 2


def measure_latencies(models: Mapping[str, PreTrainedModel], workload: Workload) -> dict[str, Latency]:
    """Time prefill and decoding of several models in turns, so that a slow spell of the machine hits all of them.

    Args:
        models: Models by name, on one device.
        workload: What is timed.

    Returns:
        Latency by name.
    """
    rounds = measure_rounds(models, workload)
    return {
        name: Latency(
            prefill_ms=statistics.median(each.prefill_ms for each in of),
            decode_ms=statistics.median(each.decode_ms for each in of),
        )
        for name, of in rounds.items()
    }


def measure_rounds(models: Mapping[str, PreTrainedModel], workload: Workload) -> dict[str, list[Latency]]:
    """Return what `measure_latencies` takes the medians of: by name, one latency a timed round."""
    rounds: dict[str, list[Latency]] = {name: [] for name in models}
    names = list(models)
    total = (workload.warmup + workload.repeats) * len(names)
    with tqdm(total=total, desc="prefill and decode", unit="round") as progress:
        for round_index in range(workload.warmup + workload.repeats):
            # the other one first in every second round: neither always runs on the other's warm or evicted caches
            for name in names if round_index % 2 == 0 else reversed(names):
                prefill_s, decode_s = _time_once(models[name], workload)
                if round_index >= workload.warmup:
                    rounds[name].append(Latency(1000 * prefill_s, 1000 * decode_s / workload.decode_tokens))
                progress.update()
    return rounds


def speeds(latency: Latency, workload: Workload) -> dict[str, float]:
    """Return the latencies and the tokens per second, of the whole batch, that they amount to."""
    return {
        "prefill_latency_ms": latency.prefill_ms,
        "prefill_tokens_per_second": 1000 * workload.batch_size * workload.prompt_length / latency.prefill_ms,
        "decode_latency_ms": latency.decode_ms,
        "decode_tokens_per_second": 1000 * workload.batch_size / latency.decode_ms,
    }


def compare(dense: Mapping[str, float], pruned: Mapping[str, float]) -> dict[str, Any]:
    """Return the ratios pruned / dense, the floors of the latencies, and a warning if nothing is gained."""
    ratio = {key: pruned[key] / dense[key] for key in dense}
    slow = [
        f"{phase} ({ratio[f'{phase}_latency_ms']:.2f} x the dense latency)"
        for phase in ("prefill", "decode")
        if ratio[f"{phase}_latency_ms"] >= 1
    ]
    warning = f"the pruned model is not faster in {' and '.join(slow)}" if slow else None
    floor = {"prefill": ratio["flops_per_token"], "decode": ratio["weight_bytes_per_token"]}
    return {"ratio": ratio, "floor": floor, "warning": warning}


@torch.inference_mode()
def _time_once(model: PreTrainedModel, workload: Workload) -> tuple[float, float]:
    """Return the seconds of one prefill, then of decoding after it."""
    ids: Int[Tensor, "batch tokens"] = fixed_prompt(
        model.config.vocab_size, workload.batch_size, workload.prompt_length
    ).to(model.device)
    start = _now(model.device)
    reply = prefill(model, ids)
    filled = _now(model.device)
    for _ in range(workload.decode_tokens):
        reply = decode(model, reply)
    return filled - start, _now(model.device) - filled


def _now(device: torch.device) -> float:
    """Return the time once the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def machine_of(device: torch.device) -> dict[str, str | int]:
    """Return what latencies depend on besides the model."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": processor or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }
