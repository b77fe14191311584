"""Plan + dense model -> pruned checkpoint, tensor by tensor.

The shapes are known before any tensor is read, so the safetensors header is written first and the tensors follow one
at a time: memory is one tensor, time about that of copying the file. Checkpoints appear whole or not at all.

Where the plan has a compensation, it is solved first, layer by layer, and each solution is written to its place in the
file at once: memory is then one layer, or where weights are resident the model.
"""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nirvana.checkpoint import modeling_nirvana
from nirvana.checkpoint.config import MODELING_FILE, own_head, pruned_config
from nirvana.checkpoint.digests import write_digests
from nirvana.checkpoint.reading import settled_tokenizer
from nirvana.checkpoint.safetensors_stream import Shards, described_bytes
from nirvana.checkpoint.tokenizer import carry
from nirvana.compensated_weights import Fit, compensated_weights
from nirvana.conformance import check_walk, check_written
from nirvana.errors import InputError
from nirvana.files import atomic_directory, write_json
from nirvana.plan import PLAN_NAME, Plan
from nirvana.slicing import Slicer
from nirvana.walk import Execution, Stack
from nirvana.weights import model_digest

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def prune(
    model_directory: Path | str,
    plan: Plan,
    checkpoint_directory: Path | str,
    on_tensor: Callable[[str], None] = lambda name: None,
    match_digest: bool = True,
    calibration: Path | str | None = None,
    device: torch.device | str = "cpu",
    execution: Execution = "resident",
    on_layer: Callable[[int], None] = lambda layer: None,
    page: tuple[str, ...] = (),
    verified: bool = False,
) -> None:
    """Write the pruned checkpoint that a plan describes.

    Args:
        model_directory: The dense model.
        plan: Which units stay.
        checkpoint_directory: Where the checkpoint appears. An earlier pruned checkpoint there is replaced, anything
            else is refused.
        on_tensor: Called after each tensor is written, for progress.
        match_digest: Refuse a model whose digest is not the plan's; False compares shapes only.
        calibration: File of the token ids that the plan's compensation is fitted on (`input_ids` as safetensors);
            not read where the plan has none.
        device: Where compensation computes.
        execution: Whether weights stay in memory once compensation has read them.
        on_layer: Called after each layer that is compensated, for progress.
        page: Texts on which the checkpoint's tokenizer is compared with the dense model's, beside a page of our own.
        verified: Load what was written and compare it with the masked dense model before it gets its name: its first
            layers on real tokens (`nirvana.conformance`).

    Raises:
        InputError: If the plan is for another model, a file is broken, the target holds something else, the
            calibration file is missing or another one, the tokenizer cannot be read or would read other ids from the
            checkpoint, the disk is too small, or what was written computes something else than the masked dense model
            (nothing is left under the final name).
    """
    source, target = Path(model_directory).resolve(), Path(checkpoint_directory).resolve()
    _check_target(source, target)
    stack = Stack.open(source, device, execution)
    architecture, weights = stack.architecture, stack.weights
    sites = architecture.sites()
    plan.check_fits(sites, model_digest(source) if match_digest else None)
    tokenizer = settled_tokenizer(source)
    slicer = Slicer(sites, plan.keep)
    config = pruned_config(architecture, plan.keep) | own_head(stack)
    written = _written(stack, stock=config["model_type"] == architecture.model_type)
    fit = Fit.planned(plan, stack, calibration)
    described = {
        name: (weights.dtype(stored), slicer.shape(name, weights.shape(stored))) for name, stored in written.items()
    }
    needed = described_bytes(described)
    _check_space(target, needed)
    if verified and fit:
        check_walk(source)  # before the costly part; else what is written tells

    def cut(name: str) -> Tensor:
        on_tensor(name)
        return slicer.apply(name, weights[written[name]])

    try:
        with atomic_directory(target) as temporary:
            write_json(temporary / "config.json", config)
            carry(source, temporary, tokenizer, page)  # whether the tokenizer can be had is known before the rest
            # one output file for each input file, so that shards keep their size relation and names
            shards = Shards(temporary, described, {name: weights.file_of[written[name]].name for name in written})
            for name, matrix in compensated_weights(fit, stack, plan, on_layer) if fit else ():
                shards.put(name, matrix)
                on_tensor(name)
            digests = shards.complete(cut)
            if "auto_map" in config:
                shutil.copyfile(modeling_nirvana.__file__, temporary / MODELING_FILE)
            plan.write(temporary / PLAN_NAME)
            write_digests(temporary, digests)
            if verified:
                _check(temporary, target, stack, plan)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise InputError(
            f"{target}: the disk became full while the checkpoint was written, expected {needed / 1e6:.0f} MB "
            f"({error.strerror}); free some space and run again"
        ) from error


def _check(written: Path, target: Path, dense: Stack, plan: Plan) -> None:
    """Compare what was written with the masked dense model; errors name the directory that was asked for."""
    try:
        check_written(written, dense, plan)
    except InputError as error:
        raise InputError(str(error).replace(str(written), str(target))) from error


def _check_target(source: Path, target: Path) -> None:
    """Refuse to replace anything but an earlier pruned checkpoint."""
    if source == target or target in source.parents:
        raise InputError(
            f"{target}: expected a directory apart from the dense model, got it or one above it; choose another"
        )
    if target.exists() and not (target.is_dir() and ((target / PLAN_NAME).is_file() or not any(target.iterdir()))):
        raise InputError(
            f"{target}: expected no such path, an empty directory or an earlier pruned checkpoint, got something else; "
            "choose another directory or move that aside"
        )


def _written(stack: Stack, stock: bool) -> dict[str, str]:
    """Return the tensors of the checkpoint, each with the stored one that it is cut from."""
    names = {name for name in stack.weights if stack.is_parameter(name)}
    if not stock:
        names |= set(stack.architecture.derived_parameters())
    return {name: stack.stored_name(name) for name in sorted(names)}


def _check_space(target: Path, needed: int) -> None:
    parent = next(p for p in target.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(
            f"{target}: expected {needed / 1e6:.0f} MB of free disk for the checkpoint, got {free / 1e6:.0f} MB; "
            "free some space or write elsewhere"
        )
