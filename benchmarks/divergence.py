"""KL of one candidate against one dense forward with logits of the same held-out batch."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import Measurement, alternate, random_text
from nirvana.allocation import Allocation, achieved_ratio, allocate
from nirvana.divergence import kl_divergence
from nirvana.walk import Stack, final_hidden_states


def measure(model: Path, repeats: int) -> list[Measurement]:
    """Return the cost of scoring a plan of ratio 0.4 on 8 × 128 held-out tokens."""
    ids = random_text(8, 128)
    stack = Stack.open(model)
    sites = stack.architecture.sites()
    generator = np.random.default_rng(0)
    saliency = {site.name: generator.lognormal(0, 1, site.units).astype(np.float32) for site in sites}
    keep = allocate(sites, saliency, Allocation(0.4, gamma=3.36))
    dense_model = AutoModelForCausalLM.from_pretrained(model).eval()
    dense = final_hidden_states(stack, ids)

    def dense_forward() -> None:
        with torch.no_grad():
            dense_model(ids)

    seconds = alternate({"dense": dense_forward, "kl": lambda: kl_divergence(stack, keep, ids, dense)}, repeats)
    ratio = achieved_ratio(sites, {name: len(kept) for name, kept in keep.items()})["total"]
    return [
        Measurement("KL plan's pruning ratio", ratio, ""),
        Measurement("KL CPU time, dense forward with logits", seconds["dense"], "s"),
        Measurement("KL CPU time, one candidate", seconds["kl"], "s"),
        Measurement("KL CPU time, candidate / dense forward", seconds["kl"] / seconds["dense"], "x", limit=1.3),
    ]
