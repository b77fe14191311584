"""`padded`: the checkpoint's weights put back into the dense shape, zero where units are gone.

Kept units go to the places they had in the dense model, not to the front. Every query head then still reads its own
KV head, in every layer and whatever their number; the file can be compared with the dense one entry by entry; and a
tool that adds back removed units finds their places free.
"""

from pathlib import Path

import torch
from torch import Tensor

from nirvana.checkpoint.config import both_spellings, own_head
from nirvana.checkpoint.safetensors_stream import Shards
from nirvana.checkpoint.tokenizer import carry
from nirvana.config_values import config_values
from nirvana.errors import InputError
from nirvana.export.hf import TOLERANCE, every_position, measure_in_transformers
from nirvana.export.source import Format, Options, Source, check_space
from nirvana.files import write_json
from nirvana.plan import Plan
from nirvana.slicing import kept_indices, pruned_slots


def _prepare(source: Source, options: Options) -> None:
    model_type = source.dense.architecture.config.model_type
    if model_type != source.dense.architecture.model_type:
        raise InputError(
            f"padded: expected a dense model of a stock class, got {model_type}; a model that was itself pruned has no "
            "uniform shape to go back to: export it with --to hf"
        )


def _write(source: Source, options: Options, directory: Path) -> Plan:
    dense = source.dense.weights
    check_space(directory, sum(file.stat().st_size for file in set(dense.file_of.values())))
    config = {key: value for key, value in config_values(source.model).items() if key != "auto_map"}
    config |= both_spellings(source.dense.architecture, config) | own_head(source.dense)
    write_json(directory / "config.json", config)
    names = filter(source.dense.is_parameter, sorted(dense))
    described = {name: (dense.dtype(name), dense.shape(name)) for name in names}
    Shards(directory, described, {name: dense.file_of[name].name for name in described}).complete(_Padding(source))
    carry(source.checkpoint, directory, source.tokenizer())
    return source.plan


class _Padding:
    """Return parameters of the checkpoint in their dense shape, by name."""

    def __init__(self, source: Source):
        self._dense, self._pruned = source.dense.weights, source.pruned.weights
        sites = source.dense.architecture.sites()
        self._pruned_slots = pruned_slots(sites, source.plan.keep)
        shared = [slot for site in sites for slot in site.slots if slot.stored_as is not None]
        self._shared = {name for slot in shared for name in (slot.parameter, slot.stored_as)}

    def __call__(self, name: str) -> Tensor:
        # A table that layers share is dense in every shape: where a unit's values are zero, its bias reaches nothing.
        if name in self._shared or name not in self._pruned:
            return self._dense[name]
        shape, kept = self._dense.shape(name), self._pruned[name]
        pruned = self._pruned_slots.get(name)
        if pruned is None:
            return kept
        (dim,) = {slot.dim for slot, _ in pruned}
        places = torch.from_numpy(kept_indices(pruned, dim, shape[dim]))
        return torch.zeros(shape, dtype=kept.dtype).index_copy_(dim, places, kept)


FORMAT = Format(
    prepare=_prepare,
    write=_write,
    measure=measure_in_transformers,
    positions=every_position,
    relative_tolerance=lambda options: TOLERANCE,
)
