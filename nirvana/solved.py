"""What compensation solves for, between the solver and the checkpoint: on disk, one file a layer.

Solving runs through the model from its first layer to its last, a checkpoint is written in the order of its files.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from nirvana.architectures.architecture import Architecture
from nirvana.calibration import calibration_digest, read_ids
from nirvana.checkpoint.safetensors_stream import stream_safetensors
from nirvana.compensation import compensate
from nirvana.errors import InputError
from nirvana.files import scratch_directory
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


@contextmanager
def solved_parameters(
    fit: Fit | None, stack: Stack, plan: Plan, beside: Path, on_layer: Callable[[int], None]
) -> Iterator[Mapping[str, Path]]:
    """Yield the file of each parameter that was solved for, in the type of the model's own, until the context ends.

    Args:
        fit: What to solve; None for nothing.
        stack: The dense model.
        plan: Which units stay.
        beside: The files lie in a temporary directory next to it.
        on_layer: Called after each layer, for progress.

    Raises:
        InputError: If activations are not finite, or the type of the model's weights cannot hold a solution.
    """
    if fit is None:
        yield {}
        return
    with scratch_directory(beside) as directory:
        files: dict[str, Path] = {}
        solved: dict[str, Tensor] = {}

        def write(place: str) -> None:
            path = directory / f"{place}.safetensors"
            described = {name: (stack.weights.dtype(name), tuple(matrix.shape)) for name, matrix in solved.items()}
            stream_safetensors(path, described, solved.__getitem__)
            files.update(dict.fromkeys(solved, path))
            solved.clear()

        def write_layer(layer: int) -> None:
            write(str(layer))
            on_layer(layer)

        for name, matrix in compensate(stack, plan.keep, fit.ids, fit.ridge, on_layer=write_layer):
            solved[name] = _as_stored(name, matrix, stack.weights[name].dtype)
        if solved:
            write("behind_the_layers")
        yield files


def _as_stored(name: str, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    stored = matrix.to(device="cpu", dtype=dtype)
    if not torch.isfinite(stored).all():
        raise InputError(
            f"{name}: expected compensated values that {dtype} can hold, got values up to {matrix.abs().max():.1e}; "
            "raise the ridge, or convert the model to bfloat16 first"
        )
    return stored


def read_solved(files: Mapping[str, Path], name: str) -> Tensor:
    """Return one of the parameters of `solved_parameters`."""
    with safe_open(files[name], framework="pt") as file:
        return file.get_tensor(name)
