"""Layer-major saliency against the naive way: all gradients and all logits at once."""

from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.common import Measurement, alternate, random_text
from benchmarks.live_memory import LiveMemory
from nirvana.saliency import channel_saliency
from nirvana.walk import Stack

MICROBATCH = 2


def naive(model: torch.nn.Module, ids: Int[Tensor, "sequences tokens"]) -> None:
    """One ordinary backward pass, then |W · ∂f/∂W| of every parameter."""
    logits = model(ids).logits
    objective = logits.max(dim=1).values.sum() / (logits.shape[0] * logits.shape[2])
    objective.backward()
    for parameter in model.parameters():
        if parameter.ndim == 2 and parameter.grad is not None:
            saliency = (parameter.detach() * parameter.grad).abs()
            saliency.sum(dim=0), saliency.sum(dim=1)
    model.zero_grad(set_to_none=True)


def measure(model: Path, repeats: int) -> list[Measurement]:
    """Return peak live memory and time of both ways on 8 × 128 tokens."""
    ids = random_text(8, 128)
    stack = Stack.open(model)
    dense = AutoModelForCausalLM.from_pretrained(model).eval()
    ways = {"naive": lambda: naive(dense, ids), "lean": lambda: channel_saliency(stack, ids, MICROBATCH)}
    peaks = {}
    for name, way in ways.items():
        with LiveMemory(ignored=(stack.weights[name] for name in stack.weights)) as memory:
            way()
        peaks[name] = memory.peak_bytes / 1e6
    seconds = alternate(ways, repeats)
    return [
        Measurement("saliency peak live memory, naive", peaks["naive"], "MB"),
        Measurement("saliency peak live memory, layer-major", peaks["lean"], "MB", limit=140),
        Measurement("saliency CPU time, naive", seconds["naive"], "s"),
        Measurement("saliency CPU time, layer-major", seconds["lean"], "s"),
        Measurement("saliency CPU time, layer-major / naive", seconds["lean"] / seconds["naive"], "x"),
    ]
