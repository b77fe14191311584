"""`nirvana export`: a pruned checkpoint as files that other tools load."""

import logging
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from nirvana.cli.one_line import printable


class Form(StrEnum):
    """What to write."""

    HF = "hf"
    UNIFORM = "uniform"
    PADDED = "padded"
    GGUF = "gguf"


class WeightType(StrEnum):
    """How a GGUF file stores matrices."""

    F16 = "f16"
    Q8_0 = "q8_0"


EPILOG = (
    "Examples:\n\n  nirvana export artifacts/checkpoint --to hf --model data/model\n\n"
    "  nirvana export artifacts/checkpoint --to uniform --model data/model "
    "--saliency artifacts/unit_saliency/candidate_003.safetensors\n\n"
    "  nirvana export artifacts/checkpoint --to gguf --type q8_0 --model data/model --output my-gguf"
)


def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Directory of the pruned checkpoint.", show_default=False)
    ],
    to: Annotated[
        Form,
        typer.Option(
            help="hf: transformers, layers of any sizes. uniform: allocated again with equal layers, stock class. "
            "padded: zeros where units are gone, dense shape, stock class. gguf: llama.cpp.",
            show_default=False,
        ),
    ],
    model: Annotated[
        Path,
        typer.Option(
            metavar="DENSE", help="Directory of the dense model it was pruned from: the reference.", show_default=False
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIRECTORY",
            help="Where the export appears, CHECKPOINT-FORM if not given; an earlier export is replaced, anything "
            "else refused.",
            show_default=False,
        ),
    ] = None,
    saliency: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="uniform: unit saliency to allocate with.", show_default=False),
    ] = None,
    weight_type: Annotated[WeightType, typer.Option("--type", help="gguf: how matrices are stored.")] = WeightType.F16,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text to compare on, instead of a page of ours.", show_default=False),
    ] = None,
    ids: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Token ids to compare on: JSON, or safetensors with input_ids.", show_default=False
        ),
    ] = None,
) -> None:
    """Write a pruned checkpoint in a form that other tools load, verified before it appears.

    A fresh load of the files must give the logits of the dense model with all pruned units zeroed, on real tokens
    (in a compensated checkpoint, what was solved for is taken as it is); the largest difference is printed and kept in
    nirvana_export.json. Otherwise nothing is written.
    """
    import sys

    import transformers
    from rich.console import Console

    from nirvana.export.export import Options, export_checkpoint

    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("gguf").setLevel(logging.ERROR)
    default = checkpoint.resolve().with_name(f"{checkpoint.resolve().name}-{to.value}")
    console = Console(stderr=True, quiet=not sys.stderr.isatty())
    with console.status("starting") as status:
        done = export_checkpoint(
            checkpoint,
            to.value,
            model,
            default if output is None else output,
            options=Options(saliency=saliency, weight_type=weight_type.value),
            text=text,
            ids=ids,
            on_stage=status.update,
        )
    note = "" if done.note is None else f"; {done.note}"
    typer.echo(f"wrote {printable(done.directory)}: {done.parity.line()}{note}")
