"""Plan + dense model -> pruned checkpoint, tensor by tensor.

The shapes are known before any tensor is read, so the safetensors header is written first and the tensors follow one
at a time: memory is one tensor, time about that of copying the file. Checkpoints appear whole or not at all.
"""

import errno
import json
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from nirvana.checkpoint import modeling_nirvana
from nirvana.checkpoint.config import MODELING_FILE, pruned_config
from nirvana.errors import InputError
from nirvana.files import atomic_directory, write_json
from nirvana.plan import Plan
from nirvana.slicing import Slicer
from nirvana.walk import Stack
from nirvana.weights import FLOAT_TYPES, INDEX_NAME, WeightFiles, model_digest

PLAN_NAME = "nirvana_plan.json"
# the tokenizer, how to generate, the licence; adapters, other weights and code stay behind
_CARRIED = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def prune(
    model_directory: Path | str,
    plan: Plan,
    checkpoint_directory: Path | str,
    on_tensor: Callable[[str], None] = lambda name: None,
    match_digest: bool = True,
) -> None:
    """Write the pruned checkpoint that a plan describes.

    Args:
        model_directory: The dense model.
        plan: Which units stay.
        checkpoint_directory: Where the checkpoint appears. An earlier pruned checkpoint there is replaced, anything
            else is refused.
        on_tensor: Called after each tensor is written, for progress.
        match_digest: Refuse a model whose digest is not the plan's; False compares shapes only.

    Raises:
        InputError: If the plan is for another model, a file is broken, the target holds something else, or the disk
            is too small (nothing is left under the final name).
    """
    source, target = Path(model_directory).resolve(), Path(checkpoint_directory).resolve()
    _check_target(source, target)
    stack = Stack.open(source)
    architecture, weights = stack.architecture, stack.weights
    sites = architecture.sites()
    plan.check_fits(sites, model_digest(source) if match_digest else None)
    slicer = Slicer(sites, plan.keep)
    _check_space(target, _checkpoint_bytes(weights, slicer))
    try:
        with atomic_directory(target) as temporary:
            _write_weights(weights, slicer, temporary, on_tensor)
            kept_units = {name: len(indices) for name, indices in plan.keep.items()}
            config = pruned_config(architecture, kept_units)
            write_json(temporary / "config.json", config)
            if "auto_map" in config:
                shutil.copyfile(modeling_nirvana.__file__, temporary / MODELING_FILE)
            plan.write(temporary / PLAN_NAME)
            _copy_companions(source, temporary)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise InputError(
            f"{target}: the disk became full while the checkpoint was written, expected "
            f"{_checkpoint_bytes(weights, slicer) / 1e6:.0f} MB ({error.strerror}); free some space and run again"
        ) from error


def _check_target(source: Path, target: Path) -> None:
    """Refuse to replace anything but an earlier pruned checkpoint."""
    if source == target or target in source.parents:
        raise InputError(
            f"{target}: expected a directory apart from the dense model, got it or one above it; choose another"
        )
    if target.exists() and not (target.is_dir() and ((target / PLAN_NAME).is_file() or not any(target.iterdir()))):
        raise InputError(
            f"{target}: expected no such path, an empty directory or an earlier pruned checkpoint, got something else; "
            "choose another directory or remove it"
        )


def _tensor_bytes(weights: WeightFiles, slicer: Slicer, name: str) -> int:
    return math.prod(slicer.shape(name, weights.shape(name))) * FLOAT_TYPES[weights.dtype(name)]


def _checkpoint_bytes(weights: WeightFiles, slicer: Slicer) -> int:
    return sum(_tensor_bytes(weights, slicer, name) for name in weights)


def _check_space(target: Path, needed: int) -> None:
    parent = next(p for p in target.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(
            f"{target}: expected {needed / 1e6:.0f} MB of free disk for the checkpoint, got {free / 1e6:.0f} MB; "
            "free some space or write elsewhere"
        )


def _write_weights(weights: WeightFiles, slicer: Slicer, directory: Path, on_tensor: Callable[[str], None]) -> None:
    """Write one output file for each input file, so that shards keep their size relation and names."""
    files: dict[str, list[str]] = {}
    for name in sorted(weights):
        files.setdefault(weights.file_of[name].name, []).append(name)
    for file_name, names in sorted(files.items()):
        _write_file(weights, slicer, directory / file_name, names, on_tensor)
    if len(files) > 1:
        weight_map = {name: file_name for file_name, names in files.items() for name in names}
        total = _checkpoint_bytes(weights, slicer)
        write_json(directory / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_file(
    weights: WeightFiles, slicer: Slicer, path: Path, names: Iterable[str], on_tensor: Callable[[str], None]
) -> None:
    """Write a safetensors file: 8 bytes of header length, a JSON header, then the tensors.

    Source: the format's own description, https://github.com/huggingface/safetensors#format.
    """
    # Wide types first: every tensor then starts at a multiple of its item size.
    ordered = sorted(names, key=lambda name: (-FLOAT_TYPES[weights.dtype(name)], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in ordered:
        end = offset + _tensor_bytes(weights, slicer, name)
        shape = list(slicer.shape(name, weights.shape(name)))
        header[name] = {"dtype": weights.dtype(name), "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in ordered:
            file.write(_bytes_of(slicer.apply(name, weights[name])))
            on_tensor(name)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer, generation settings and licence; never code, never other weights."""
    for pattern in _CARRIED:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and file.name != INDEX_NAME:
                shutil.copyfile(file, target / file.name)
