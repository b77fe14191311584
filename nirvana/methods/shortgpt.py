"""ShortGPT: whole layers leave, those that turn the residual stream least.

A layer's block influence is 1 − E[cos(h, h')] over all positions, h what enters it and h' what leaves it. The layers
of least influence are removed at once, as many as come nearest to the budget; depth is all it can choose.

Source: ShortGPT (arXiv 2403.03853), block influence; icip-cas/ShortGPT, shortgpt/metrics.py and shortgpt.py at
9a2ee8d.

Deviations: (1) Calibration text as every other method, not windows of 256 tokens of PG-19. (2) The last layer's
output is taken before the final norm; the code reads transformers' last hidden state, which is behind it. (3) The
number of layers follows from the ratio of block weights, which a checkpoint of whole layers meets to within half a
layer.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nirvana.architectures.architecture import Architecture
from nirvana.architectures.registry import architecture_for
from nirvana.checkpoint.config import pruned_config
from nirvana.checkpoint.reading import settled_tokenizer
from nirvana.checkpoint.safetensors_stream import stream_safetensors
from nirvana.checkpoint.tokenizer import carry
from nirvana.errors import InputError
from nirvana.files import atomic_directory, write_json
from nirvana.walk import Ids, Stack, small_batches, walk_forward
from nirvana.weights import INDEX_NAME, WEIGHTS_NAME

RECORD_NAME = "shortgpt.json"
"""What left, and why: beside the checkpoint's config.json."""
_PER_LAYER, _LAYER_INDICES = ("layer_types",), ("mlp_only_layers",)
"""Configuration keys with a value a layer, and with numbers of layers."""


def write_shortgpt(
    model_directory: Path | str, stack: Stack, ids: Ids, pruning_ratio: float, target_directory: Path | str
) -> float:
    """Write a stock checkpoint that lacks the layers of least block influence.

    Args:
        model_directory: The dense model.
        stack: The same, opened.
        ids: Calibration sequences.
        pruning_ratio: Share of the block weights that leaves.
        target_directory: Where the checkpoint appears. An earlier one of this method is replaced, anything else
            refused.

    Returns:
        The share that left: as near to `pruning_ratio` as whole layers come; one layer stays.

    Raises:
        InputError: If the ratio is not in [0, 1), the model is an encoder-decoder or already pruned, or the target
            holds something else.
    """
    target = Path(target_directory)
    _check(stack, pruning_ratio, Path(model_directory), target)
    influence = block_influence(stack, ids)
    removed, achieved = layers_to_remove(influence, _layer_weights(stack.architecture), pruning_ratio)
    kept = [layer for layer in range(stack.num_layers) if layer not in removed]
    config = _shorter_config(stack.architecture, kept)
    with atomic_directory(target) as temporary:
        _write_weights(stack, kept, temporary)
        write_json(temporary / "config.json", config)
        write_json(
            temporary / RECORD_NAME,
            {
                "achieved_ratio": achieved,
                "block_influence": influence,
                "removed_layers": removed,
                "requested_ratio": pruning_ratio,
            },
        )
        carry(Path(model_directory), temporary, settled_tokenizer(Path(model_directory)))
    return achieved


@torch.no_grad()
def block_influence(stack: Stack, ids: Ids, on_layer: Callable[[int], None] = lambda layer: None) -> list[float]:
    """Return each layer's block influence, 0 (nothing changes direction) to 2, on the calibration set.

    Raises:
        InputError: If a token id is out of range.
    """
    stack.check_ids(ids)
    parts = small_batches(stack, ids)
    influence = []
    for layer, weights in stack.layers(range(stack.num_layers)):
        outputs = walk_forward(stack, parts, layer, weights)
        cosines = [
            torch.nn.functional.cosine_similarity(before[-1].double(), after[-1].double(), dim=-1).flatten()
            for before, after in zip(parts, outputs, strict=True)
        ]
        influence.append(1.0 - float(torch.cat(cosines).mean()))
        parts = outputs
        on_layer(layer)
    return influence


def layers_to_remove(
    influence: Sequence[float], weights: Sequence[int], pruning_ratio: float
) -> tuple[list[int], float]:
    """Return the layers that leave, in order, and the share of block weights that leaves with them.

    Args:
        influence: Block influence of each layer.
        weights: Its block weights.
    """
    order = np.argsort(influence, kind="stable")[:-1]  # one layer stays
    gone = np.concatenate([[0], np.cumsum(np.asarray(weights)[order])]) / sum(weights)
    count = int(np.argmin(np.abs(gone - pruning_ratio)))
    return sorted(order[:count].tolist()), float(gone[count])


def _check(stack: Stack, pruning_ratio: float, source: Path, target: Path) -> None:
    if not 0 <= pruning_ratio < 1:
        raise InputError(f"pruning_ratio: expected 0 <= ratio < 1, got {pruning_ratio}; choose e.g. 0.2")
    if stack.architecture.is_encoder_decoder:
        raise InputError(
            f"ShortGPT: expected a decoder-only model, got {stack.architecture.model_type}; choose another method"
        )
    if source.resolve() == target.resolve() or target.resolve() in source.resolve().parents:
        raise InputError(
            f"{target}: expected a directory apart from the dense model, got it or one above it; choose another"
        )
    earlier = target.is_dir() and ((target / RECORD_NAME).is_file() or not any(target.iterdir()))
    if target.exists() and not earlier:
        raise InputError(
            f"{target}: expected no such path, an empty directory or an earlier ShortGPT checkpoint, got something "
            "else; choose another directory or move that aside"
        )


def _layer_weights(architecture: Architecture) -> list[int]:
    weights = [0] * architecture.num_layers
    for site in architecture.sites():
        weights[site.layer] += site.weights
    return weights


def _shorter_config(architecture: Architecture, kept: Sequence[int]) -> dict[str, Any]:
    """Return the stock configuration of the kept layers.

    Raises:
        InputError: If there is none: the model is pruned, or its configuration says by a layer's number what it is.
    """
    values = pruned_config(architecture, {site.name: np.arange(site.units) for site in architecture.sites()})
    if "auto_map" in values:
        raise InputError(
            f"ShortGPT: expected a model of a stock class, got {values['model_type']}; start from the dense model"
        )
    new_number = {layer: number for number, layer in enumerate(kept)}
    values["num_hidden_layers"] = len(kept)
    for key in _PER_LAYER:
        if isinstance(values.get(key), list):
            values[key] = [values[key][layer] for layer in kept]
    for key in _LAYER_INDICES:
        if isinstance(values.get(key), list):
            values[key] = [new_number[layer] for layer in values[key] if layer in new_number]
    _check_same_layers(architecture, values, kept)
    return values


def _check_same_layers(architecture: Architecture, values: Mapping[str, Any], kept: Sequence[int]) -> None:
    shorter = architecture_for(type(architecture.config).from_dict(dict(values)))
    for number, layer in enumerate(kept):
        before, after = (
            {name.removeprefix(each.layer_prefix(index)): each.parameter_shapes[name] for name in names}
            for each, index in ((architecture, layer), (shorter, number))
            for names in [each.layer_parameters(index)]
        )
        if before != after:
            raise InputError(
                f"ShortGPT: expected layer {layer} to be the same as layer {number} of a shorter model, got other "
                f"parameters; the configuration of this {architecture.model_type} ties a layer's kind to its number"
            )


def _write_weights(stack: Stack, kept: Sequence[int], directory: Path) -> None:
    """Write one file for each of the dense model's that has anything left."""
    files: dict[str, dict[str, str]] = {}
    for name, stored in _renamed(stack, kept).items():
        files.setdefault(stack.weights.file_of[stored].name, {})[name] = stored
    for file_name, names in sorted(files.items()):
        _write_file(stack, directory / file_name, names)
    if list(files) != [WEIGHTS_NAME]:
        weight_map = {name: file_name for file_name, names in files.items() for name in names}
        write_json(directory / INDEX_NAME, {"metadata": {}, "weight_map": weight_map})


def _write_file(stack: Stack, path: Path, stored: Mapping[str, str]) -> None:
    header = {name: (stack.weights.dtype(source), stack.weights.shape(source)) for name, source in stored.items()}

    def read(name: str) -> Tensor:
        return stack.weights[stored[name]]

    stream_safetensors(path, header, read)


def _renamed(stack: Stack, kept: Sequence[int]) -> dict[str, str]:
    """Return the tensors of the checkpoint, each with the stored one that it is: layers numbered anew."""
    prefix_of = stack.architecture.layer_prefix
    names = {name for name in stack.weights if stack.is_parameter(name)}
    result: dict[str, str] = {}
    for layer in range(stack.num_layers):
        of_layer = {name for name in names if name.startswith(prefix_of(layer))}
        names -= of_layer
        if layer in kept:
            new = prefix_of(kept.index(layer))
            result |= {new + name.removeprefix(prefix_of(layer)): name for name in of_layer}
    return result | {name: name for name in names}
