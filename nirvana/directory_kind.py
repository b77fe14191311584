"""What a directory is that is not a model, and what to do about it."""

import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nirvana.errors import InputError
from nirvana.files import read_json

PICKLE_REMEDY = (
    "pickled weights (.bin, .pt) are not loaded because reading them can run code; convert them once with "
    "`AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OTHER_DIR)` in a place where you trust them"
)
_ADAPTER_FILE = re.compile(r"adapter_config\.json|adapter_model\.\w+")
_DEEPEST, _MOST = 4, 20_000  # folders below the directory, and files, that are looked at
_OTHER_FORMATS = {
    ".h5": "TensorFlow weights",
    ".msgpack": "Flax weights",
    ".onnx": "an ONNX model",
    ".distcp": "a distributed training checkpoint",
}


@dataclass(frozen=True)
class Kind:
    """What was found in place of a model."""

    found: str
    remedy: str


def names_below(directory: Path) -> list[str]:
    """Return the files of a directory and of its first levels of folders, as relative paths."""
    names: list[str] = []
    for folder, folders, files in os.walk(directory):
        inner = Path(folder).relative_to(directory)
        if len(inner.parts) >= _DEEPEST or len(names) > _MOST:
            folders.clear()
        names += [(inner / file).as_posix() for file in files]
    return names


def kind_of_directory(directory: Path) -> Kind | None:
    """Return what a directory is that is not a model; None if that is not known."""

    def read(name: str) -> Any:
        return read_json(directory / name) if name.endswith(".json") else (directory / name).read_text("utf-8").strip()

    return kind_of(names_below(directory), read, str(directory)) if directory.is_dir() else None


def kind_of(names: Collection[str], read: Callable[[str], Any], place: str) -> Kind | None:
    """Return what files are that are not a model; None if that is not known.

    Args:
        names: Paths relative to the directory.
        read: Returns the content of one of them: JSON, or text without the white space around it.
        place: The directory, as the remedy shall spell it.
    """
    top = {name for name in names if "/" not in name}
    if "adapter_config.json" in top:
        return _adapter(read, place)
    if "model_index.json" in top:
        return Kind("a pipeline of diffusers", "choose a language model")
    if "modules.json" in top and "config.json" not in top:
        inner = _folders(names, r"([^/]+)/config\.json")
        return Kind("a model of sentence-transformers", f"name the transformer in it: {_choice(place, inner)}")
    for pattern, found in (
        (r"(snapshots/[^/]+)/config\.json", "the root of a Hugging Face cache entry"),
        (r"(models--[^/]+/snapshots/[^/]+)/config\.json", "a whole Hugging Face cache"),
        (r"(checkpoint-\d+)/config\.json", "the output of a trainer that holds only checkpoints"),
        (r"(checkpoint-\d+)/adapter_config\.json", "the output of a trainer that holds only adapters"),
        (r"([^/]+)/config\.json", "a folder with models in it"),
    ):
        folders = _folders(names, pattern)
        if folders and "config.json" not in top:
            return Kind(found, f"name the directory that was meant: {_choice(place, _first_meant(folders, read))}")
    return _other_format(top, place)


def _adapter(read: Callable[[str], Any], place: str) -> Kind:
    try:
        base = read("adapter_config.json").get("base_model_name_or_path")
    except (InputError, OSError, AttributeError):
        base = None
    return Kind(
        f"an adapter of {base if isinstance(base, str) and base.isprintable() else 'another model'}",
        "merge it first: `from peft import AutoPeftModelForCausalLM as M; "
        f'M.from_pretrained("{place}").merge_and_unload().save_pretrained("OTHER_DIR")`, the tokenizer beside it, and '
        "give OTHER_DIR",
    )


def _other_format(top: set[str], place: str) -> Kind | None:
    gguf = sorted(name for name in top if name.endswith(".gguf"))
    if gguf:
        return Kind("GGUF files", f"name one of them, as path:{place}/{gguf[0]}")
    if any(name.startswith("consolidated") and name.endswith(".safetensors") for name in top):
        return Kind(
            "weights in Mistral's own form (consolidated*.safetensors)",
            "take the Hugging Face form of the same model, with model.safetensors or an index",
        )
    pickled = sorted(name for name in top if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if pickled:
        return Kind(pickled[0], PICKLE_REMEDY)
    for name in sorted(top):
        if Path(name).suffix in _OTHER_FORMATS:
            return Kind(
                f"{_OTHER_FORMATS[Path(name).suffix]} ({name})",
                "save the model with save_pretrained of a transformers that reads them",
            )
    shards = sorted(name for name in top if name.endswith(".safetensors"))
    if len(shards) > 1:
        return Kind(
            f"{', '.join(shards[:3])} and no index that says which belong together",
            "fetch model.safetensors.index.json beside them",
        )
    return None


def _folders(names: Iterable[str], pattern: str) -> list[str]:
    return sorted({match[1] for name in names if (match := re.fullmatch(pattern, name))})


def _first_meant(folders: list[str], read: Callable[[str], Any]) -> list[str]:
    """Order folders: the snapshot that the cache's main branch is at, and the newest checkpoint, come first."""
    try:
        main = read("refs/main") if folders[0].startswith("snapshots/") else None
    except (InputError, OSError, ValueError):
        main = None
    return sorted(folders, key=lambda folder: (folder != f"snapshots/{main}", -_number(folder), folder))


def _number(folder: str) -> int:
    match = re.fullmatch(r"checkpoint-(\d{1,18})", folder)
    return int(match[1]) if match else 0


def _choice(place: str, folders: list[str]) -> str:
    if not folders:
        return "the folder that holds config.json"
    others = f" (or another of {len(folders)})" if len(folders) > 1 else ""
    return f"{place}/{folders[0]}{others}"


def refuse_adapter(names: Iterable[str], place: Path | str) -> None:
    """Refuse a model that has an adapter beside its weights: transformers would add it, nothing else would.

    Args:
        names: Files of the directory.
        place: What errors call it.

    Raises:
        InputError: If there is one.
    """
    files = sorted(name for name in names if _ADAPTER_FILE.fullmatch(name))
    if files:
        raise InputError(
            f"{place}: expected a model alone, got the files of an adapter beside it ({', '.join(files[:3])}), which "
            "transformers would add to the weights; move them to an ADAPTER_DIR of their own, and if the model is "
            "meant with it, merge it first: `PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(DIR), "
            "ADAPTER_DIR).merge_and_unload().save_pretrained(OTHER_DIR)`"
        )
