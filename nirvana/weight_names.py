"""Which files of a directory hold a model's weights: one answer, for a directory and for the listing of a repository.

As transformers: `model.safetensors` if it is there, else what `model.safetensors.index.json` names. Where neither is, a
single other safetensors file is the model, whatever it is called. Adapters and Mistral's `consolidated.safetensors`,
which repeats the model under other names, never are.
"""

import re
from collections.abc import Callable, Collection
from typing import Any

from nirvana.errors import InputError
from nirvana.fields import shortened

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# no separator of any system and short enough for any: a name can then only mean a file of the same directory
_SHARD_NAME = re.compile(r"[^\W.][\w.+= ,@#()\[\]-]{0,199}\.safetensors", re.ASCII)
_NEVER = re.compile(r"\.|adapter_model|consolidated")


def weight_names(names: Collection[str], read_index: Callable[[], Any], where: str) -> list[str]:
    """Return the names of the weight files, in order; none where the directory holds no such files.

    Args:
        names: Files of the directory; what lies deeper than its top level is not looked at.
        read_index: Returns what `model.safetensors.index.json` holds; called only if it decides.
        where: What errors call the directory.

    Raises:
        InputError: If the index is of another form, or names a file that is missing or lies elsewhere.
    """
    if WEIGHTS_NAME in names:
        return [WEIGHTS_NAME]
    if INDEX_NAME in names:
        shards = _shard_names(read_index(), f"{where}/{INDEX_NAME}")
        for name in shards:
            if name not in names:
                raise InputError(
                    f"{where}: expected the weight file {name}, which {INDEX_NAME} names, found no such file; "
                    "fetch the model again"
                )
        return shards
    single = [name for name in names if "/" not in name and name.endswith(".safetensors") and not _NEVER.match(name)]
    return single if len(single) == 1 and _SHARD_NAME.fullmatch(single[0]) else []


def _shard_names(content: Any, index: str) -> list[str]:
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: expected a weight_map that names the weight files; fetch the model again")
    for name in weight_map.values():
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise InputError(
                f"{index}: expected file names beside it that end in .safetensors, got {shortened(name)}; "
                "do not use this model, or save it again with save_pretrained"
            )
    return sorted(set(weight_map.values()))
