"""Which configuration keys transformers' code of a family reads, and which of them its description knows.

Read from the source of the installed release with `ast`: a key that a new release begins to read is in the answer
without anybody having to know of it.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, masking_utils, modeling_rope_utils
from transformers.utils.generic import merge_with_config_defaults

from nirvana import architectures
from nirvana.architectures import architecture, decoder, followed, registry

_CONFIGURATIONS = ("config", "effective_config", "layer_config")
_SIZES = ("num_", "d_", "vocab_size", "hidden_size", "intermediate_size", "initializer", "_", "head_dim", "per_layer")
_ROPES = ("rope_parameters_dict", "rope_parameters", "rope_params")


def keys_read(model: PreTrainedModel) -> set[str]:
    """Return every key that the code of a model's modules, its masks, its rotary kinds and its configuration read.

    Args:
        model: Any instance of the stock class; it may be on the meta device.

    Returns:
        Names as config.json spells them; `rope_parameters.KEY` for what is inside.
    """
    sources: list[Any] = [*_classes(type(module) for module in model.modules()), masking_utils]
    keys = {key for source in [*sources, merge_with_config_defaults] for key in _reads(source)}
    if hasattr(model.config, "rope_parameters"):
        inside = _reads(modeling_rope_utils, _ROPES) - {"get", "items", "keys", "setdefault"}
        keys |= _reads(modeling_rope_utils) | {f"rope_parameters.{key}" for key in inside}
    for config_class in _classes([type(model.config)]):
        keys |= _reads(config_class, ("self", "kwargs"), methods=("__post_init__", "convert_rope_params_to_dict"))
    return {key for key in keys if not _is_code(type(model.config), key)}


def keys_of_the_walk(model: PreTrainedModel) -> set[str]:
    """Return the keys that are read where the walk takes the place of a class: between the layers, and for masks."""
    whole = _classes(type(module) for module in model.modules() if isinstance(module, PreTrainedModel))
    keys = {key for source in [*whole, masking_utils, merge_with_config_defaults] for key in _reads(source)}
    return {key for key in keys if not _is_code(type(model.config), key)}


def keys_described(model_type: str) -> set[str]:
    """Return the keys that the description of a family names: as attributes of a configuration, or as text."""
    described: set[str] = set()
    for module in (architecture, decoder, followed, _description(model_type)):
        tree = ast.parse(inspect.getsource(module))
        described |= set(_reads(module))
        texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        described |= {text for text in texts if isinstance(text, str) and text.isidentifier()}
    return described


def unusual_keys(model: PreTrainedModel) -> list[str]:
    """Return `key=value` for the keys that the class reads and that differ from its defaults, sizes left out."""
    default, config = type(model.config)(), model.config
    values = {key: getattr(config, key, None) for key in sorted(keys_read(model)) if not key.startswith(_SIZES)}
    unusual = {key: value for key, value in values.items() if value != getattr(default, key, None)}
    return [f"{key}={value!r:.160}" for key, value in unusual.items()]


def unknown_keys(model: PreTrainedModel, model_type: str) -> list[str]:
    """Return `key=value` for the keys that the class reads and the description does not; of unusual value, if any."""
    default, config = type(model.config)(), model.config
    unknown = sorted(keys_of_the_walk(model) - keys_described(model_type))
    values = {key: getattr(config, key, None) for key in unknown}
    unusual = [key for key in unknown if values[key] != getattr(default, key, None)]
    return [f"{key}={values[key]!r:.40}" for key in unusual or unknown]


def _description(model_type: str) -> ModuleType:
    return inspect.getmodule(registry.FAMILIES[model_type]) or architectures


def _classes(classes: Iterable[type]) -> list[type]:
    """Return the classes of family code among these and their bases."""
    bases = {base for each in classes for base in each.__mro__ if base.__module__.startswith("transformers.models.")}
    return sorted(bases - {nn.Module, PreTrainedModel, PreTrainedConfig}, key=lambda each: each.__qualname__)


def _reads(source: Any, objects: tuple[str, ...] = _CONFIGURATIONS, methods: tuple[str, ...] = ()) -> set[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(source)))
    parts: list[ast.AST] = [tree]
    if methods:
        parts = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in methods]
    return {key for part in parts for node in ast.walk(part) for key in _keys(node, objects)}


def _keys(node: ast.AST, objects: tuple[str, ...]) -> Iterator[str]:
    """Yield the key that a node reads: `config.KEY`, `config["KEY"]`, `config.get("KEY")`, `getattr(config, "KEY")`."""
    if isinstance(node, ast.Attribute) and _is_one_of(node.value, objects):
        yield node.attr
    elif isinstance(node, ast.Subscript) and _is_one_of(node.value, objects):
        yield from _text(node.slice)
    elif isinstance(node, ast.Call) and node.args:
        called = node.func
        if isinstance(called, ast.Name) and called.id in ("getattr", "hasattr") and _is_one_of(node.args[0], objects):
            yield from _text(node.args[1])
        elif isinstance(called, ast.Attribute) and _is_one_of(called.value, objects):
            yield from _text(node.args[0]) if called.attr in ("get", "pop", "setdefault") else ()


def _is_one_of(node: ast.AST, objects: tuple[str, ...]) -> bool:
    return (isinstance(node, ast.Name) and node.id in objects) or (
        isinstance(node, ast.Attribute) and node.attr in objects
    )


def _text(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


def _is_code(config_class: type, key: str) -> bool:
    """Tell whether a name is a method of the configuration rather than one of its values, or private."""
    return key.startswith("__") or callable(getattr(config_class, key, None)) or key in ("get", "pop", "setdefault")
