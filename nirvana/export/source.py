"""What every export reads, and what a format is."""

import errno
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from nirvana.checkpoint.companions import has_tokenizer
from nirvana.checkpoint.digests import check_digests
from nirvana.checkpoint.reading import settled_tokenizer
from nirvana.checkpoint.recovered import RECOVERY_NAME
from nirvana.checkpoint.tokenizer import read_tokenizer
from nirvana.compensated_weights import compensated_parameters
from nirvana.errors import InputError
from nirvana.export.parity import Parity
from nirvana.plan import PLAN_NAME, Plan
from nirvana.walk import Stack
from nirvana.weights import model_digest


@dataclass(frozen=True)
class Source:
    """A pruned checkpoint with the dense model it was cut from."""

    checkpoint: Path
    model: Path
    plan: Plan
    pruned: Stack
    dense: Stack

    @classmethod
    def open(cls, checkpoint: Path, model: Path) -> "Source":
        """Open both and make sure that they belong together.

        Raises:
            InputError: If the checkpoint has no plan or was fine-tuned, either cannot be read, or the plan is of
                another model.
        """
        if not (checkpoint / PLAN_NAME).is_file():
            raise InputError(
                f"{checkpoint}: expected a pruned checkpoint with {PLAN_NAME}, found none; "
                "name the directory that the prune step wrote"
            )
        if (checkpoint / RECOVERY_NAME).is_file():
            raise InputError(
                f"{checkpoint}: expected the checkpoint that prune wrote, got one that was fine-tuned, which cannot be "
                "compared with the masked dense model; export the pruned one"
            )
        check_digests(checkpoint)
        plan = Plan.read(checkpoint / PLAN_NAME)
        pruned, dense = Stack.open(checkpoint), Stack.open(model)
        sites = dense.architecture.sites()
        plan.check_fits(sites, None)
        plan.check_sizes(pruned.architecture.sites(), checkpoint)
        plan.check_fits(sites, model_digest(model))
        return cls(checkpoint, model, plan, pruned, dense)

    def tokenizer(self) -> Any:
        """Return what the dense model reads text with, for a checkpoint that has a tokenizer; None for one without.

        Raises:
            InputError: If it cannot be read.
        """
        if not has_tokenizer(self.checkpoint):
            return None
        return settled_tokenizer(self.model) or read_tokenizer(self.checkpoint)

    def compensated(self) -> dict[str, Tensor]:
        """Return what compensation may have solved for, by name: views of the checkpoint's pages, read when used."""
        return {name: self.pruned.weights[name] for name in sorted(compensated_parameters(self.dense.architecture))}


@dataclass(frozen=True)
class Options:
    """What only some formats ask for."""

    saliency: Path | None = None
    """Unit saliency to allocate with (uniform)."""
    weight_type: str = "f16"
    """How matrices are stored (gguf): f16 or q8_0."""


@dataclass(frozen=True)
class Measured:
    """What a runtime computed from exported files."""

    values: Float[Tensor, "positions vocab"]
    runtime: str
    quantity: str = "logits"


@dataclass(frozen=True)
class Format:
    """One way to write a checkpoint."""

    prepare: Callable[[Source, Options], None]
    """Refuse now what cannot be written."""
    write: Callable[[Source, Options, Path], Plan]
    """Fill a new directory; return the plan that describes what is in it."""
    measure: Callable[[Source, Path, Any, NDArray[np.int64]], Measured]
    """Run the files afresh on token ids; return what they say at some positions."""
    positions: Callable[[Source, int], NDArray[np.int64]]
    """Which positions of a sequence of so many tokens to compare."""
    relative_tolerance: Callable[[Options], float]
    """Largest difference that passes, relative to the largest reference value."""
    finish: Callable[[Path, Parity], None] = lambda directory, parity: None
    """Note the finding inside the files, where the format has a place for it."""


def check_space(directory: Path, needed: int) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        InputError: If fewer bytes are free.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise InputError(
            f"{directory.parent}: expected {needed / 1e6:.0f} MB of free disk for the export, got {free / 1e6:.0f} MB; "
            "free some space or write elsewhere"
        )


def is_disk_full(error: OSError) -> bool:
    """Tell whether an error means that no more can be written."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
