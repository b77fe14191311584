"""The values of a model's config.json as transformers shall read them: old spellings in today's words.

A configuration that an author published is not wrong because a later release of transformers has another word for
what it says. Everything that reads one, and everything that is written from it, goes through here.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nirvana.errors import InputError
from nirvana.fields import shortened
from nirvana.files import read_json

# Far beyond any real model. Configuration classes and skeletons run loops and make lists of these lengths, so that a
# broken number would cost all memory before any other check sees it.
_MOST_LAYERS, _MOST_COUNTED = 500, 10_000
# Keys that make transformers read other files than the ones a model's digest covers.
_REDIRECTING = ("transformers_weights", "configuration_files")
_ROPE_TYPES = {
    "su": "longrope",  # what Phi-3 called it first
    "mrope": "default",  # positions in time, height and width are one and the same where all there is is text
}
_ROPE_KEYS = ("rope_scaling", "rope_parameters")
# Which kernels compute: no property of a model, and those that its author had (flash_attention_2) may not be here.
_KERNELS = ("_attn_implementation", "attn_implementation", "_experts_implementation", "experts_implementation")


def config_values(model_directory: Path | str) -> dict[str, Any]:
    """Read config.json, old spellings replaced.

    Raises:
        InputError: If it is missing or no JSON object, has counts that no model has, or names other files to read.
    """
    path = Path(model_directory) / "config.json"
    try:
        content = read_json(path)
    except InputError as error:  # whoever wrote the file, it is not ours to delete
        raise InputError(f"{str(error).rsplit(';', 1)[0]}; take the file that the model's author published") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: expected the configuration of a model as a JSON object, got {shortened(content)}; "
            "fetch the model again"
        )
    _check_counts(path, content)
    for key in _REDIRECTING:
        if key in content:
            raise InputError(
                f"{path}: expected no key {key}, which would load other files than the model's own; "
                "leave it out if you trust the model"
            )
    return normalised(content)


def normalised(content: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration in the words that transformers reads today; its parts too."""
    values = copy.deepcopy(content)
    for part in _parts(values):
        for rope in _rope_values(part):
            for key in ("rope_type", "type"):
                if isinstance(rope.get(key), str):
                    rope[key] = _ROPE_TYPES.get(rope[key], rope[key])
        for key in _KERNELS:
            part.pop(key, None)
        pad = part.get("pad_token_id")
        if type(pad) is int and pad < 0:  # how early configurations say that there is none
            part["pad_token_id"] = None
        if "pad_token_id" not in part and _default_padding(part) is not None:
            part["pad_token_id"] = None
    return values


def _default_padding(part: dict[str, Any]) -> int | None:
    """Return the padding token that the class assumes where none is named, if the embedding has no row for it."""
    from transformers import CONFIG_MAPPING

    name, size = part.get("model_type"), part.get("vocab_size")
    if not isinstance(name, str) or name not in CONFIG_MAPPING or type(size) is not int:
        return None
    pad = getattr(CONFIG_MAPPING[name], "pad_token_id", None)
    return pad if type(pad) is int and pad >= size > 0 else None


def _parts(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield values
    if isinstance(values.get("text_config"), dict):
        yield values["text_config"]


def _rope_values(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what says how positions turn: once, or for each kind of layer."""
    for key in _ROPE_KEYS:
        if isinstance(rope := part.get(key), dict):
            yield rope
            yield from (inner for inner in rope.values() if isinstance(inner, dict))


def generation_values(content: Any, vocabulary: int) -> Any:
    """Return generation_config.json without a padding token that the embedding has no row for."""
    pad = content.get("pad_token_id") if isinstance(content, dict) else None
    if type(pad) is not int or 0 <= pad < vocabulary:
        return content
    return {key: value for key, value in content.items() if key != "pad_token_id"}


def check_padding(values: dict[str, Any], where: str) -> None:
    """Refuse a padding token that the embedding has no row for: transformers cannot build such a model.

    Raises:
        InputError: If `pad_token_id` is not below `vocab_size`.
    """
    pad, size = values.get("pad_token_id"), values.get("vocab_size")
    if type(pad) is int and type(size) is int and pad >= size > 0:
        raise InputError(
            f"{where}: expected pad_token_id below vocab_size ({size}), got {shortened(pad)}; write "
            '"pad_token_id": null there and in generation_config.json: nothing is padded here, and no class of '
            "transformers takes this value"
        )


def culprit(values: dict[str, Any], builds: Callable[[dict[str, Any]], object]) -> str | None:
    """Return the key without which something can be built from a configuration; None where there is no single one.

    Args:
        values: A configuration that it cannot be built from.
        builds: Builds it, or raises.
    """
    for key in values:
        if key == "model_type":
            continue
        try:
            builds({other: value for other, value in values.items() if other != key})
        except Exception:  # noqa: S112  (whatever transformers makes of odd values: another key is tried)
            continue
        return key
    return None


def _check_counts(path: Path, config: Any) -> None:
    """Refuse counts (`num_layers`, `num_experts`, `num_labels`, ...) that no model has, at any depth."""
    waiting = [config]
    while waiting:
        value = waiting.pop()
        waiting += value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
        for key, count in value.items() if isinstance(value, dict) else ():
            most = _MOST_LAYERS if key.endswith("layers") else _MOST_COUNTED
            if key.startswith("num_") and isinstance(count, int | float) and count > most:
                raise InputError(
                    f"{path}: expected {key} of at most {most}, got {shortened(count)}; fetch the model again"
                )
