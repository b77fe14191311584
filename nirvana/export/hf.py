"""`hf`: the checkpoint as prune wrote it, with the code that its layers of different sizes need beside it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana.checkpoint import modeling_nirvana
from nirvana.checkpoint.config import MODELING_FILE
from nirvana.checkpoint.tokenizer import carry
from nirvana.export.parity import loaded_logits
from nirvana.export.source import Format, Measured, Options, Source, check_space
from nirvana.plan import Plan
from nirvana.weights import INDEX_NAME

TOLERANCE = 1e-4
"""Relative: float32 sums in another order differ by some 1e-6; a wrong unit by 1e-2 and more."""


def every_position(source: Source, tokens: int) -> NDArray[np.int64]:
    """Compare everywhere: one forward gives all of them."""
    return np.arange(tokens)


def measure_in_transformers(source: Source, directory: Path, ids: Any, positions: NDArray[np.int64]) -> Measured:
    """Load the directory afresh with transformers and return its logits."""
    return Measured(loaded_logits(directory, ids, positions), runtime="transformers")


def _write(source: Source, options: Options, directory: Path) -> Plan:
    files = sorted(set(source.pruned.weights.file_of.values()))
    check_space(directory, sum(file.stat().st_size for file in files))
    for file in files:
        shutil.copyfile(file, directory / file.name)
    for name in ("config.json", INDEX_NAME):
        if (source.checkpoint / name).is_file():
            shutil.copyfile(source.checkpoint / name, directory / name)
    if "auto_map" in json.loads((directory / "config.json").read_text(encoding="utf-8")):
        # this release's own file, which the comparison has run: a file from a directory is never trusted
        shutil.copyfile(modeling_nirvana.__file__, directory / MODELING_FILE)
    carry(source.checkpoint, directory, source.tokenizer())
    return source.plan


FORMAT = Format(
    prepare=lambda source, options: None,
    write=_write,
    measure=measure_in_transformers,
    positions=every_position,
    relative_tolerance=lambda options: TOLERANCE,
)
