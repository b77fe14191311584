"""What a plan's compensation solves for, as the checkpoint stores it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nirvana.architectures.architecture import Architecture
from nirvana.calibration import calibration_digest, read_ids
from nirvana.compensation import compensate
from nirvana.errors import InputError
from nirvana.plan import Plan
from nirvana.projections import output_projections
from nirvana.walk import Ids, Stack


@dataclass(frozen=True)
class Fit:
    """A compensation that nothing stands in the way of."""

    ridge: float
    ids: Ids
    names: frozenset[str]
    """The parameters that are solved for."""

    @classmethod
    def planned(cls, plan: Plan, stack: Stack, calibration: Path | str | None) -> "Fit | None":
        """Return what a plan asks for; None where it asks for none.

        Args:
            plan: A plan that fits the model.
            stack: The dense model.
            calibration: File of the token ids that the plan names.

        Raises:
            InputError: If the file is missing, cannot be read or holds other ids, or the model cannot be compensated.
        """
        asked = plan.compensation
        if asked is None:
            return None
        if calibration is None:
            raise InputError(
                f"plan: expected the token ids {asked.calibration_digest} that its compensation is fitted on, got no "
                "file; give it: --calibration FILE, in Python prune(..., calibration=FILE)"
            )
        ids = read_ids(calibration)
        digest = calibration_digest(ids)
        if digest != asked.calibration_digest:
            raise InputError(
                f"{calibration}: expected the token ids {asked.calibration_digest} that the plan's compensation is "
                f"fitted on, got {digest}; give the file that the plan was made with, or make the plan again"
            )
        stack.check_ids(ids)
        return cls(asked.ridge, ids, compensated_parameters(stack.architecture))


def compensated_parameters(architecture: Architecture) -> frozenset[str]:
    """Return the names of all parameters that `compensate` may solve for.

    Raises:
        InputError: If units write through a matrix that is no module of its own.
    """
    layers = output_projections(architecture).values()
    return frozenset(each.name for layer in layers for each in layer) | {f"{architecture.norm_prefix}weight"}


def compensated_weights(
    fit: Fit, stack: Stack, plan: Plan, on_layer: Callable[[int], None] = lambda layer: None
) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter that is solved for, in the type of the model's own, as soon as its layer is.

    Args:
        fit: What to solve.
        stack: The dense model.
        plan: Which units stay.
        on_layer: Called after each layer, for progress.

    Raises:
        InputError: If activations are not finite, or the type of the model's weights cannot hold a solution.
    """
    for name, matrix in compensate(stack, plan.keep, fit.ids, fit.ridge, on_layer=on_layer):
        yield name, _as_stored(name, matrix, stack.weights[name].dtype)


def _as_stored(name: str, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    stored = matrix.to(device="cpu", dtype=dtype)
    if not torch.isfinite(stored).all():
        raise InputError(
            f"{name}: expected compensated values that {dtype} can hold, got values up to {matrix.abs().max():.1e}; "
            "raise the ridge, or convert the model to bfloat16 first"
        )
    return stored
