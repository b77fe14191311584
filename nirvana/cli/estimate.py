"""`nirvana estimate`: what each step will take, before anything is loaded."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nirvana.methods.registry import METHODS
from nirvana.presets import COMPENSATION_SEQUENCES, PRESETS

Preset = Literal["nirvana", "best"]
_BEST = PRESETS["best"]
BEST: dict[str, Any] = {
    "needs": METHODS[_BEST["saliency.method"]].needs,
    "compensation_sequences": COMPENSATION_SEQUENCES,
    "self_generated": _BEST["compensation.self_generated"],
}
"""What the preset of that name asks of the steps."""

EPILOG = (
    "Examples:\n\n  nirvana estimate data/model\n\n"
    "  nirvana estimate llama-8b --sequences 32 --pruning-ratio 0.4 --no-lm-eval\n\n"
    "  nirvana estimate data/model --preset best --recovery-tokens 200000\n\n"
    "Only config.json has to be there: look before you download."
)


def estimate(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Directory with the model's config.json.", show_default=False)
    ],
    sequences: Annotated[int, typer.Option(min=1, help="Calibration sequences a candidate.")] = 8,
    sequence_length: Annotated[int, typer.Option(min=2, help="Their tokens.")] = 128,
    microbatch: Annotated[int, typer.Option(min=1, help="Sequences a forward.")] = 2,
    pool_size: Annotated[int, typer.Option(min=1, help="Candidates.")] = 6,
    pruning_ratio: Annotated[float, typer.Option(min=0, max=1, help="Share of the block weights that leaves.")] = 0.2,
    preset: Annotated[
        Preset, typer.Option(help="nirvana, or best: Fisher saliency and compensation, as params.yaml has them.")
    ] = "nirvana",
    recovery_tokens: Annotated[int, typer.Option(min=0, help="Tokens to fine-tune on; 0: none.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the candidates.")] = 1,
    lm_eval: Annotated[
        bool, typer.Option(help="Whether evaluation runs lm-eval tasks, which need the whole model.")
    ] = True,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda: whose memory counts.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")] = False,
) -> None:
    """Predict peak memory, disk and time of every step, with weights in memory or streamed, and what fits here."""
    from dataclasses import asdict

    from nirvana.device import available_bytes, resolve_device
    from nirvana.estimate import steps as estimating

    on = resolve_device(device)
    work = estimating.Workload(
        pool_size=pool_size,
        sequences=sequences,
        sequence_length=sequence_length,
        microbatch=microbatch,
        pruning_ratio=pruning_ratio,
        recovery_tokens=recovery_tokens,
        workers=workers,
        lm_eval=lm_eval,
        **BEST if preset == "best" else {},
    )
    estimates = estimating.estimate(model, work, on)
    free = available_bytes(on)
    execution, memory = estimating.choose(model, work, on, "auto", "auto")
    if as_json:
        content = {
            "free_bytes": free,
            "auto": {"execution": execution, "memory": memory},
            "steps": [asdict(each) for each in estimates],
        }
        typer.echo(json.dumps(content, indent=2))
        return
    from rich.console import Console

    from nirvana.estimate.table import estimate_table

    console = Console()
    console.print(estimate_table(estimates, free, f"{model}: what each step takes"))
    console.print(f"{free / 1e9:.1f} GB free here; auto takes weights {execution}, memory {memory}", highlight=False)
