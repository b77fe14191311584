"""Step: fine-tune the pruned checkpoint on text of the calibration split; with `recovery.tokens: 0` do nothing."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nirvana.checkpoint.recovered import write_form
from nirvana.files import atomic_directory, atomic_file, write_json

if TYPE_CHECKING:
    from tasks.params import Params

COLUMNS = ("tokens", "training_loss", "heldout_loss", "heldout_kl")


def run(params: "Params", inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> None:
    """Write the recovered checkpoint or adapter, the learning curve and its summary.

    Raises:
        InputError: If peft is missing, the documents are too few, or the loss is not finite.
    """
    if params.recovery.tokens:
        from tasks.recovery.fine_tuning import (
            fine_tune,  # brings torch: seconds that a step with nothing to do must not take
        )

        summary, curve, state = fine_tune(params, inputs, outputs["recovered"])
        _write_reports(outputs, summary, curve)
        state.unlink(missing_ok=True)
        return
    with atomic_directory(outputs["recovered"]) as directory:
        write_form(directory, "none")
    _write_reports(outputs, {"form": "none", "tokens": 0}, [])


def _write_reports(outputs: Mapping[str, Path], summary: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]) -> None:
    write_json(outputs["recovery"], summary)
    with atomic_file(outputs["recovery_curve"]) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(curve)
