"""What fine-tuning left in a directory: one small file that says so, beside a checkpoint, an adapter or nothing."""

from pathlib import Path
from typing import Any, Literal, get_args

from nirvana.fields import Fields
from nirvana.files import read_json, write_json

RECOVERY_NAME = "nirvana_recovery.json"
Form = Literal["none", "merged", "adapter"]
"""Nothing was to be recovered; a whole checkpoint; or the adapter alone."""


def write_form(directory: Path, form: Form, **settings: Any) -> None:
    """Write what a directory holds, and the settings that made it."""
    write_json(directory / RECOVERY_NAME, {"form": form, **settings})


def read_form(directory: Path) -> Form:
    """Return what a directory holds.

    Raises:
        InputError: If it does not say.
    """
    file = directory / RECOVERY_NAME
    said = Fields(read_json(file), str(file), "run `dvc repro recover`")
    form: Any = said.choice("form", get_args(Form))
    return form
