"""Layer-major saliency against the naive way: all gradients and all logits at once."""

from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.common import Measurement, alternate, random_text
from benchmarks.live_memory import LiveMemory
from nirvana.allocation import Allocation, allocate
from nirvana.divergence import kl_divergence
from nirvana.saliency import channel_saliency, unit_saliency
from nirvana.walk import Stack, final_hidden_states

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
    """Return peak live memory and time of each way on 8 × 128 tokens, and of scoring a candidate as a whole."""
    ids, heldout = random_text(8, 128), random_text(8, 128).flip(0)
    stack = Stack.open(model)
    sites = stack.architecture.sites()
    dense_model = AutoModelForCausalLM.from_pretrained(model).eval()
    dense = final_hidden_states(stack, heldout)

    def candidate() -> None:
        sums = channel_saliency(stack, ids, MICROBATCH, memory="fast").sums
        saliency = {name: values.numpy() for name, values in unit_saliency(sites, sums).items()}
        kl_divergence(stack, allocate(sites, saliency, Allocation(0.4, gamma=3.36)), heldout, dense)

    ways: dict[str, Callable[[], object]] = {
        "naive": lambda: naive(dense_model, ids),
        "lean": lambda: channel_saliency(stack, ids, MICROBATCH, memory="lean"),
        "fast": lambda: channel_saliency(stack, ids, MICROBATCH, memory="fast"),
        "candidate": candidate,
    }
    peaks = {}
    for name in ("naive", "lean", "fast"):
        with LiveMemory(ignored=(stack.weights[weight] for weight in stack.weights)) as memory:
            ways[name]()
        peaks[name] = memory.peak_bytes / 1e6
    seconds = alternate(ways, repeats)
    naive_seconds, share = seconds["naive"], peaks["lean"] / peaks["naive"]
    return [
        Measurement("saliency peak live memory, naive", peaks["naive"], "MB"),
        Measurement("saliency peak live memory, lean", peaks["lean"], "MB", limit=140),
        Measurement("saliency peak live memory, fast", peaks["fast"], "MB"),
        Measurement("saliency peak live memory, lean / naive", share, "x", limit=0.08),
        Measurement("saliency CPU time, naive forward and backward", naive_seconds, "s"),
        Measurement("saliency CPU time, lean / naive", seconds["lean"] / naive_seconds, "x", limit=1.10),
        Measurement("saliency CPU time, fast / naive", seconds["fast"] / naive_seconds, "x", limit=0.80),
        Measurement(
            "candidate CPU time, saliency (fast) + plan + KL / naive", seconds["candidate"] / naive_seconds, "x", 1.5
        ),
    ]
