"""How the cost of a streamed candidate grows: twice the layers, the tokens, the vocabulary, the width."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.common import Measurement, random_text
from benchmarks.large import SCRATCH, Shape, measured, write_random_model

_BASE = Shape(1024, 4096, 6, 16, 4, 32768, True)
_TOKENS = 128


def score(directory: Path, sequences: int) -> None:
    """Saliency, plan and KL of one candidate of `sequences` × 128 tokens."""
    from nirvana.allocation import Allocation, allocate
    from nirvana.divergence import kl_divergence
    from nirvana.saliency import channel_saliency, unit_saliency
    from nirvana.walk import Stack, final_hidden_states

    stack = Stack.open(directory / "model", execution="streamed")
    ids, sites = random_text(sequences, _TOKENS) % stack.architecture.vocab_size, stack.architecture.sites()
    saliency = unit_saliency(sites, channel_saliency(stack, ids, microbatch=2).sums)
    keep = allocate(sites, {name: values.numpy() for name, values in saliency.items()}, Allocation(0.4, gamma=3.36))
    kl_divergence(stack, keep, ids, final_hidden_states(stack, ids))


def measure(model: Path, repeats: int) -> list[Measurement]:
    """Return time and peak of the base shape, and the factors by which doubling each size moves them.

    Args:
        model: Not used: shapes of our own.
        repeats: Runs of each shape; the fastest counts.
    """
    variants = {
        "base": (_BASE, 4),
        "2 x layers": (replace(_BASE, num_hidden_layers=12), 4),
        "2 x tokens": (_BASE, 8),
        "2 x vocabulary": (replace(_BASE, vocab_size=65536), 4),
        "2 x width": (
            replace(_BASE, hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8),
            4,
        ),
    }
    taken: dict[str, tuple[float, float]] = {}
    for name, (shape, sequences) in variants.items():
        directory = SCRATCH / "growth"
        shutil.rmtree(directory, ignore_errors=True)
        try:
            write_random_model(shape, directory / "model")
            runs = [measured(partial(score, sequences=sequences), directory) for _ in range(min(repeats, 3))]
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        taken[name] = min(seconds for seconds, _ in runs), max(peak for _, peak in runs) / 1e9
    seconds, peak = taken.pop("base")
    result = [
        Measurement("growth, base: 6 layers of 1024, 32k tokens, 4 x 128, time", seconds, "s"),
        Measurement("growth, base: peak anonymous memory", peak, "GB"),
    ]
    for name, (more_seconds, more_peak) in taken.items():
        result.append(Measurement(f"growth, {name}: time / base", more_seconds / seconds, "x"))
        result.append(Measurement(f"growth, {name}: peak / base", more_peak / peak, "x"))
    return result
