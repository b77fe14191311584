"""Step: dense model + plan -> pruned checkpoint, compensated where the plan says so; and its KL, if not known yet."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from nirvana.checkpoint.tokenizer import read_if_any
from nirvana.device import resolve_device
from nirvana.files import write_json
from nirvana.head import head_divergence
from nirvana.plan import Plan
from nirvana.surgery import prune
from nirvana.walk import Execution, Stack, final_hidden_states
from tasks.corpus.token_files import read_ids
from tasks.estimates.way_of_computing import chosen_way

if TYPE_CHECKING:
    import torch

    from tasks.params import Params


def run(params: "Params", inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> None:
    """Write the checkpoint directory and the KL(dense‖pruned) of what is in it.

    The KL of a plan that is some candidate's own, without compensation, is known from the selection: null is written.
    """
    plan = Plan.read(inputs["plan"])
    known = plan.compensation is None and plan.parameters["candidates_averaged"] == 1
    device = resolve_device(params.runtime.device)
    plain = plan.compensation is None
    solving = {}
    if not plain:
        sequences, length = read_ids(inputs["compensation_ids"])[0].shape
        solving = {"compensation_sequences": sequences, "compensation_length": length}
    execution = chosen_way(params, inputs["model"], read_ids(inputs["heldout"]), device, **solving).execution
    with tqdm(desc="compensate", unit="layer", disable=plain) as layers, tqdm(desc="prune", unit="tensor") as tensors:
        prune(
            inputs["model"],
            plan,
            outputs["checkpoint"],
            on_tensor=lambda name: tensors.update(),
            calibration=None if plain else inputs["compensation_ids"],
            device=device,
            execution=execution,
            on_layer=lambda layer: layers.update(),
            page=_held_out_text(inputs),
            verified=True,
        )
    value = None if known else _kl_divergence(inputs, outputs["checkpoint"], device, execution)
    write_json(outputs["divergence"], {"kl_divergence": value})


def _held_out_text(inputs: Mapping[str, Path]) -> tuple[str, ...]:
    """Return a page of the corpus, on which the checkpoint's tokenizer is compared with the dense model's."""
    first = read_ids(inputs["heldout"])[0][0]
    tokenizer = read_if_any(inputs["model"])
    return () if tokenizer is None else (str(tokenizer.decode(first, skip_special_tokens=True)),)


def _kl_divergence(inputs: Mapping[str, Path], checkpoint: Path, device: "torch.device", execution: Execution) -> float:
    ids = read_ids(inputs["heldout"])
    dense, pruned = (Stack.open(directory, device, execution) for directory in (inputs["model"], checkpoint))
    before, after = (final_hidden_states(stack, ids).flatten(0, 1) for stack in (dense, pruned))
    return head_divergence(before, after, dense.head_weight(), dense.architecture.logit_softcap)
