"""`python -m benchmarks.large SHAPE`: a random model of a real shape through every step of the method, streamed.

Cost does not depend on what weights say, so a checkpoint of random bfloat16 weights stands for the real one. It is
written shard by shard beside the checkout's other scratch files and deleted afterwards. Each step runs in a process of
its own: the peaks are the steps' own.
"""

import json
import multiprocessing
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import Measurement, random_text, write
from nirvana.errors import InputError

LIMIT_BROKEN = 3
"""Exit status: everything ran, a figure is outside its bounds."""
SCRATCH = Path(".cache/bench")
RATIO = 0.4
LIMIT_BYTES = 8e9
"""Of anonymous memory at the 8B shape; the authors' code states about 80 GB."""


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes, as its config.json has them."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool


SHAPES = {
    "8b": Shape(4096, 14336, 32, 32, 8, 128256, False),  # meta-llama/Llama-3.1-8B
    "1.2b": Shape(2048, 8192, 16, 32, 8, 128256, True),  # meta-llama/Llama-3.2-1B
    "tiny": Shape(256, 512, 3, 8, 2, 2048, True),  # for the test of this file
}


def write_random_model(shape: Shape, directory: Path) -> None:
    """Write the checkpoint, a shard a layer; at most one shard is in memory."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from nirvana.architectures.registry import architecture_for, read_config
    from nirvana.files import write_json
    from nirvana.weights import INDEX_NAME

    directory.mkdir(parents=True)
    LlamaConfig(
        **vars(shape), dtype="bfloat16", head_dim=shape.hidden_size // shape.num_attention_heads
    ).save_pretrained(directory)
    architecture = architecture_for(read_config(directory))
    shapes = architecture.parameter_shapes
    of_layers = [architecture.layer_parameters(layer) for layer in range(architecture.num_layers)]
    others = [[name] for name in shapes if not any(name in names for names in of_layers)]
    generator = torch.Generator().manual_seed(0)
    first: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    for number, names in enumerate([*of_layers, *others]):
        tensors = {}
        for name in names:
            kind = name.rsplit(".", 2)[1]
            if len(shapes[name]) == 1:
                tensors[name] = torch.ones(shapes[name], dtype=torch.bfloat16)
            elif kind in first and number < len(of_layers):
                # random numbers are slow to draw: the first layer's, moved on by some rows
                tensors[name] = first[kind].roll(7 * number, dims=0)
            else:
                drawn = torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
                tensors[name] = first.setdefault(kind, drawn) if number == 0 else drawn
        file = f"model-{number + 1:05d}.safetensors"
        save_file(tensors, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    write_json(directory / INDEX_NAME, {"metadata": {}, "weight_map": weight_map})


def measured(step: Callable[[Path], None], directory: Path) -> tuple[float, int]:
    """Run a step in a process of its own; return its seconds and the peak of its anonymous memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _set_threads, (torch.get_num_threads(),)) as pool:
        return pool.submit(_timed, step, directory).result()


def _set_threads(threads: int) -> None:
    torch.set_num_threads(threads)


def _timed(step: Callable[[Path], None], directory: Path) -> tuple[float, int]:
    from nirvana.device import PeakAnonymous

    start = time.perf_counter()
    with PeakAnonymous() as memory:
        step(directory)
    return time.perf_counter() - start, memory.peak_bytes


def collect_gradients(directory: Path) -> None:
    """Score 2 × 128 tokens and keep the unit saliency."""
    from safetensors.torch import save_file

    from nirvana.saliency import channel_saliency, unit_saliency
    from nirvana.walk import Stack

    stack = Stack.open(directory / "model", execution="streamed")
    sums = channel_saliency(stack, _text(stack), microbatch=2).sums
    save_file(unit_saliency(stack.architecture.sites(), sums), directory / "saliency.safetensors")


def allocate(directory: Path) -> None:
    """Make the plan of ratio 0.4."""
    from safetensors.numpy import load_file

    from nirvana.allocation import Allocation
    from nirvana.allocation import allocate as allocate_units
    from nirvana.plan import Plan
    from nirvana.walk import Stack

    sites = Stack.open(directory / "model").architecture.sites()
    keep = allocate_units(sites, load_file(directory / "saliency.safetensors"), Allocation(RATIO, gamma=3.36))
    Plan.build(
        sites,
        keep,
        model_digest="sha256:random",
        model_type="llama",
        calibration_digest="sha256:random",
        allocation=Allocation(RATIO, gamma=3.36, round_to=8, rule="exact", scope="global"),
    ).write(directory / "plan.json")


def score_pool(directory: Path) -> None:
    """KL of the plan on 2 × 128 held-out tokens, the dense walk included."""
    from nirvana.divergence import kl_divergence
    from nirvana.plan import Plan
    from nirvana.walk import Stack, final_hidden_states

    stack = Stack.open(directory / "model", execution="streamed")
    ids = _text(stack)
    kl_divergence(stack, Plan.read(directory / "plan.json").keep, ids, final_hidden_states(stack, ids))


def prune(directory: Path) -> None:
    """Write the pruned checkpoint."""
    from nirvana.plan import Plan
    from nirvana.surgery import prune as prune_model

    prune_model(directory / "model", Plan.read(directory / "plan.json"), directory / "pruned", match_digest=False)


def evaluate(directory: Path) -> None:
    """Token perplexity of the pruned checkpoint on 2 × 128 tokens."""
    from nirvana.perplexity import token_perplexity
    from nirvana.walk import Stack

    stack = Stack.open(directory / "pruned", execution="streamed")
    ids = _text(stack)
    token_perplexity(stack, ids, ids[:, 1:])


def _text(stack: Any) -> torch.Tensor:
    return random_text(2, 128) % stack.architecture.vocab_size


STEPS = (collect_gradients, allocate, score_pool, prune, evaluate)


def measure(name: str, directory: Path) -> list[Measurement]:
    """Return what each step took of the shape's model, beside what was predicted."""
    from nirvana.estimate.steps import Workload, estimate

    start = time.perf_counter()
    write_random_model(SHAPES[name], directory / "model")
    result = [Measurement(f"{name} writing the random model", time.perf_counter() - start, "s")]
    work = Workload(
        pool_size=1,
        sequences=2,
        heldout_sequences=2,
        pruning_ratio=RATIO,
        perplexity_tokens=256,
        window=128,
        lm_eval=False,
    )
    predicted = {each.step: each for each in estimate(directory / "model", work) if each.execution == "streamed"}
    for step in STEPS:
        seconds, peak = measured(step, directory)
        result.append(Measurement(f"{name} {step.__name__}, time", seconds, "s"))
        limit = LIMIT_BYTES / 1e9 if name == "8b" else None
        result.append(Measurement(f"{name} {step.__name__}, peak anonymous memory", peak / 1e9, "GB", limit))
        if step.__name__ in predicted:
            ratio = peak / predicted[step.__name__].peak_bytes
            result.append(Measurement(f"{name} {step.__name__}, measured / predicted peak", ratio, "x", 1.2, 0.8))
    plan = json.loads((directory / "plan.json").read_text())
    result.append(Measurement(f"{name} achieved ratio", plan["achieved_ratio"]["total"], ""))
    return result


def main(
    shape: Annotated[str, typer.Argument(help=f"One of {', '.join(SHAPES)}.")],
    threads: Annotated[int, typer.Option(min=1, help="Intra-op threads.")] = 2,
) -> None:
    """Measure one shape and write reports/bench/SHAPE.json."""
    if shape not in SHAPES:
        raise InputError(f"expected one of {', '.join(SHAPES)}, got {shape!r}; correct the name")
    torch.set_num_threads(threads)
    needed = 2 * 2 * sum(_parameters(SHAPES[shape]))
    SCRATCH.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(SCRATCH).free
    if free < needed:
        raise InputError(
            f"expected {needed / 1e9:.0f} GB of free disk for the models, got {free / 1e9:.0f} GB; free some"
        )
    directory = SCRATCH / f"large-{shape}"
    shutil.rmtree(directory, ignore_errors=True)  # of a killed run
    try:
        holds = write(shape, measure(shape, directory))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if not holds:
        raise typer.Exit(LIMIT_BROKEN)


def _parameters(shape: Shape) -> tuple[int, ...]:
    attention = 2 * shape.hidden_size**2 * (1 + shape.num_key_value_heads / shape.num_attention_heads)
    layer = int(attention) + 3 * shape.hidden_size * shape.intermediate_size
    return layer * shape.num_hidden_layers, shape.hidden_size * shape.vocab_size * (2 - shape.tie_word_embeddings)


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
