"""What the steps of params.yaml will take of this machine, as a table.

The flow shows it before the first step that walks the model, once for each model and setting.
"""

import hashlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nirvana.errors import InputError
from tasks.params import load_params
from tasks.workers.child import fix_torch

if TYPE_CHECKING:
    from nirvana.estimate.steps import Workload
    from tasks.params import Params

MODEL = Path("data/model")
_SECTIONS = (
    "calibration",
    "saliency",
    "allocation",
    "compensation",
    "recovery",
    "evaluation",
    "benchmark",
    "compute",
    "runtime",
)


def shown_file(params: "Params") -> Path | None:
    """Return where the table of this model and these settings is kept; None before the model is there."""
    config = MODEL / "config.json"
    if not config.is_file():
        return None
    asked = {name: asdict(getattr(params, name)) for name in _SECTIONS}
    key = hashlib.sha256(config.read_bytes() + json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return Path(".cache/estimates") / f"{key[:32]}.txt"


def workload(params: "Params") -> "Workload":
    """Return what params.yaml asks of the steps, whoever shares it."""
    from nirvana.estimate.steps import Workload
    from nirvana.methods.registry import METHODS

    compensated = params.compensation.method != "none"
    return Workload(
        pool_size=params.calibration.pool_size,
        sequences=params.calibration.sequences,
        sequence_length=params.calibration.sequence_length,
        microbatch=params.saliency.microbatch,
        heldout_sequences=params.calibration.heldout_sequences,
        heldout_length=params.calibration.heldout_length,
        needs=METHODS[params.saliency.method].needs,
        draws=params.saliency.draws,
        pruning_ratio=params.allocation.pruning_ratio,
        compensation_sequences=params.compensation.sequences if compensated else 0,
        self_generated=params.compensation.self_generated if compensated else 0,
        compensation_length=params.compensation.sequence_length,
        recovery_tokens=params.recovery.tokens,
        recovery_rank=params.recovery.rank,
        distillation=params.recovery.distillation,
        recovery_curve_every=params.recovery.curve_every,
        perplexity_tokens=params.evaluation.perplexity_tokens,
        window=params.evaluation.window,
        batch_size=params.evaluation.batch_size,
        lm_eval=bool(params.evaluation.tasks),
        prompt_length=params.benchmark.prompt_length,
    )


def main() -> None:
    """Print the table and keep it."""
    from io import StringIO

    from rich.console import Console

    from nirvana.device import available_bytes, resolve_device
    from nirvana.estimate.steps import choose, estimate
    from nirvana.estimate.table import estimate_table
    from nirvana.files import atomic_file
    from tasks.estimates.way_of_computing import workers_of

    params = load_params()
    file = shown_file(params)
    if file is None:
        raise InputError(f"expected a model in {MODEL}, found none; run `dvc repro fetch_model` first")
    fix_torch(params.compute.threads)
    device, work = resolve_device(params.runtime.device), workload(params)
    work = replace(work, workers=workers_of(params.runtime, MODEL, work, device))
    execution, memory = choose(MODEL, work, device, params.runtime.execution, params.runtime.memory)
    free = available_bytes(device)
    text = StringIO()
    console = Console(file=text, width=100)
    console.print(estimate_table(estimate(MODEL, work, device), free, "What the steps will take"))
    console.print(f"{free / 1e9:.1f} GB free here; weights {execution}, memory {memory}", highlight=False)
    with atomic_file(file) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
    sys.stdout.write(text.getvalue())
