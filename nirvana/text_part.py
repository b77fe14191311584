"""Write a model anew as the plain model of its family: the text part of a wrapper, or weights under other names.

A model of pictures and text holds a language model; some directories hold one whose tensors have names that
transformers does not look for. Either becomes a directory that every tool loads, tensor by tensor: memory is two
tensors. The weights themselves are copied bit for bit.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from nirvana.architectures.architecture import Architecture
from nirvana.architectures.registry import FAMILIES, architecture_for, check_supported, read_config
from nirvana.architectures.wrappers import COMPARED, text_config, text_family
from nirvana.checkpoint.companions import copy_companions
from nirvana.checkpoint.safetensors_stream import stream_safetensors
from nirvana.config_values import check_padding, config_values
from nirvana.directory_kind import refuse_adapter
from nirvana.errors import InputError
from nirvana.files import atomic_directory, write_json
from nirvana.layout import Layout, check_parameters, has_layer, layout_of
from nirvana.weights import INDEX_NAME, WEIGHTS_NAME, WeightFiles

_LOG = logging.getLogger(__name__)


def holds_text_part(config: PretrainedConfig) -> bool:
    """Tell whether a configuration is of a wrapper whose text part can be taken out."""
    return config.model_type in COMPARED and text_family(config) in FAMILIES


@dataclass(frozen=True)
class PlainModel:
    """A model's files, read as those of the plain model of its family."""

    architecture: Architecture
    weights: WeightFiles
    layout: Layout
    wrapper: str | None
    """`model_type` of the wrapper; None where the model is a plain one."""

    @classmethod
    def open(cls, directory: Path | str) -> "PlainModel":
        """Find the plain model in a directory; nothing of the weights is read.

        Raises:
            InputError: If the family is unknown, the model is quantised, or a file is missing or broken.
        """
        config = read_config(directory)
        check_supported(config, str(directory))
        weights = WeightFiles(directory)
        wrapper = None
        if holds_text_part(config):
            wrapper = config.model_type
            given = config_values(directory)
            config = text_config(config, given, _has_own_head(config, given, weights))
            check_padding(config.to_dict(), f"{directory}/config.json: text_config")
        architecture = architecture_for(config)
        if not has_layer(architecture, architecture.num_layers - 1, list(weights)):
            raise InputError(
                f"{directory}: expected parameters of layer {architecture.num_layers}, the last that config.json has, "
                "found none; the configuration and the weights do not belong together"
            )
        layout = layout_of(architecture, weights)
        weights.arrange(layout.stored)
        check_parameters(architecture, weights, layout.prefix if wrapper else "")
        return cls(architecture, weights, layout, wrapper)

    @property
    def is_plain(self) -> bool:
        """Tell whether transformers loads the directory as it is."""
        by_index = len({*self.weights.file_of.values()}) > 1 or self._first_file.with_name(INDEX_NAME).is_file()
        named = by_index or self._first_file.name == WEIGHTS_NAME
        return self.wrapper is None and named and self.layout.is_read_by(self.architecture)

    @property
    def _first_file(self) -> Path:
        return next(iter(self.weights.file_of.values()))

    def write(self, directory: Path, on_tensor: Callable[[str], None] = lambda name: None) -> None:
        """Write configuration and weights into an existing directory."""
        files: dict[str, list[str]] = {}
        for name in sorted({*self.architecture.parameter_shapes, self.architecture.own_head_parameter}):
            if name in self.weights:
                files.setdefault(self.weights.file_of[name].name, []).append(name)
        if len(files) == 1:
            files = {WEIGHTS_NAME: next(iter(files.values()))}
        for file_name, names in sorted(files.items()):
            described = {name: (self.weights.dtype(name), self.weights.shape(name)) for name in names}

            def read(name: str) -> Any:
                on_tensor(name)
                return self.weights[name]

            stream_safetensors(directory / file_name, described, read)
        if len(files) > 1:
            weight_map = {name: file_name for file_name, names in files.items() for name in names}
            write_json(directory / INDEX_NAME, {"metadata": {}, "weight_map": weight_map})
        write_json(directory / "config.json", _written_values(self.architecture.config))


def _has_own_head(config: PretrainedConfig, given: dict[str, Any], weights: WeightFiles) -> bool:
    """Tell whether the output head is stored; a wrapper without one, that does not tie it, lacks it."""
    if any(name == "lm_head.weight" or name.endswith(".lm_head.weight") for name in weights):
        return True
    return not bool(getattr(config, "tie_word_embeddings", True))


def _written_values(config: PretrainedConfig) -> dict[str, Any]:
    """Return what config.json says: JSON, without how and where it was read."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in values.items() if key not in ("_name_or_path", "_attn_implementation")}


def write_text_part(
    source: Path | str, target: Path | str, on_tensor: Callable[[str], None] = lambda name: None
) -> None:
    """Save a model as the plain model of its family: the text part alone, under the names of the family's class.

    Args:
        source: A model directory: of a wrapper (Gemma 3, Mistral 3, Qwen2.5-VL, LLaVA, ...), or of a plain model.
        target: Where the plain one appears, tokenizer files beside it; missing or empty.
        on_tensor: Called with each tensor's name, for progress.

    Raises:
        InputError: If the model is of no known family or not whole, or the target holds something.
    """
    source, target = Path(source), Path(target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target}: expected no such path or an empty directory, got something; choose another")
    if source.is_dir():
        refuse_adapter((file.name for file in source.iterdir()), source)
    model = PlainModel.open(source)
    with atomic_directory(target) as temporary:
        model.write(temporary, on_tensor)
        copy_companions(source, temporary)
    _LOG.info("the %s model of %s is in %s", model.architecture.model_type, source, target)
