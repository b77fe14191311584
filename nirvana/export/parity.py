"""Whether exported files say what the pruned model says: logits compared on real tokens.

The reference is the dense model masked by the plan (`nirvana.masking`), walked layer by layer.
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from nirvana.errors import InputError
from nirvana.head import head_logits
from nirvana.loading import load_model
from nirvana.masking import masked_stack
from nirvana.walk import Stack, final_hidden_states


@dataclasses.dataclass(frozen=True)
class Parity:
    """What comparing an export with its reference found."""

    quantity: str
    """`logits`, or `log-probabilities` where a runtime tells nothing else."""
    runtime: str
    """What computed from the exported files."""
    positions: int
    """Token positions compared."""
    max_abs_difference: float
    tolerance: float
    """The largest difference that passes, in the same unit: relative tolerance × the reference's largest value."""
    top1_agreement: float
    """Share of the positions at which both name the same most likely token."""
    ids_digest: str
    """SHA-256 of the token ids."""

    @property
    def passed(self) -> bool:
        """Tell whether the largest difference is within the tolerance; NaN is not."""
        return self.max_abs_difference <= self.tolerance

    def line(self) -> str:
        """Return the finding as one line for people."""
        return (
            f"max |difference| of {self.quantity} {self.max_abs_difference:.2e} (tolerance {self.tolerance:.2e}), "
            f"top-1 agreement {self.top1_agreement:.1%}, {self.positions} positions, {self.runtime}"
        )


@torch.no_grad()
def masked_logits(
    model_directory: Path | str,
    keep: Mapping[str, NDArray[np.int64]],
    ids: Any,
    positions: NDArray[np.int64],
    updates: Mapping[str, Tensor] | None = None,
) -> Float[Tensor, "positions vocab"]:
    """Return the logits of the dense model with all other units zeroed: one layer in memory at a time.

    Args:
        model_directory: The dense model.
        keep: Kept units by site name.
        ids: One sequence, as `Stack.embed` takes it.
        positions: Which positions of the sequence that is predicted.
        updates: See `nirvana.masking.masked_stack`.
    """
    masked = masked_stack(Stack.open(model_directory, execution="streamed"), keep, updates)
    hidden = final_hidden_states(masked, ids)[0, torch.from_numpy(positions)]
    return head_logits(hidden, masked.head_weight(), masked.architecture.logit_softcap)


@torch.no_grad()
def loaded_logits(checkpoint: Path | str, ids: Any, positions: NDArray[np.int64]) -> Float[Tensor, "positions vocab"]:
    """Return the logits of a checkpoint directory, loaded afresh with transformers."""
    return model_logits(load_model(checkpoint), ids, positions)


@torch.no_grad()
def model_logits(model: Any, ids: Any, positions: NDArray[np.int64]) -> Float[Tensor, "positions vocab"]:
    """Return a loaded model's logits at some positions of one sequence."""
    names = ("input_ids", "decoder_input_ids")
    arguments = dict(zip(names, ids, strict=True)) if isinstance(ids, tuple) else {"input_ids": ids}
    return model(**arguments, use_cache=False).logits[0, torch.from_numpy(positions)].float()


def compare(
    reference: Float[Tensor, "positions vocab"],
    exported: Float[Tensor, "positions vocab"],
    *,
    relative_tolerance: float,
    quantity: str,
    runtime: str,
    ids: Any,
) -> Parity:
    """Return how far two sets of logits differ.

    Args:
        reference: Of the masked dense model.
        exported: Of the exported files; entries of -inf (the runtime does not tell them) are not compared.
        relative_tolerance: Largest difference that passes, relative to the largest absolute reference value.
        quantity: What the numbers are.
        runtime: What computed `exported`.
        ids: The tokens, for the record.
    """
    told = ~torch.isneginf(exported)
    difference = (reference - exported)[told].abs().max().item()
    return Parity(
        quantity=quantity,
        runtime=runtime,
        positions=len(reference),
        max_abs_difference=_rounded(difference),
        tolerance=_rounded(relative_tolerance * max(1.0, reference[told].abs().max().item())),
        top1_agreement=_rounded((reference.argmax(1) == exported.argmax(1)).double().mean().item()),
        ids_digest=_digest(ids),
    )


def check(parity: Parity, what: str) -> None:
    """Refuse an export that does not say what the masked dense model says.

    Raises:
        InputError: If the largest difference is above the tolerance.
    """
    if not parity.passed:
        raise InputError(
            f"{what}: expected the logits of the dense model masked by the plan, got {parity.line()}; nothing was "
            "written: the checkpoint's weights are not those of its plan (trained further, or of another model)"
        )


def _rounded(value: float) -> float:
    """Keep four digits: what lies below differs between machines and says nothing."""
    return float(f"{value:.3e}") if math.isfinite(value) else value


def _digest(ids: Any) -> str:
    digest = hashlib.sha256()
    for part in ids if isinstance(ids, tuple) else (ids,):
        digest.update(f"{tuple(part.shape)}".encode() + part.to(torch.int64).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
