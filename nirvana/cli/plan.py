"""`nirvana plan`: show, compare, apply and check pruning plans."""

import json
from pathlib import Path
from typing import Annotated

import typer

from nirvana.cli.one_line import printable
from nirvana.errors import InputError
from nirvana.plan import Plan
from nirvana.plan_diff import diff_plans
from nirvana.plan_summary import summarise

app = typer.Typer(
    no_args_is_help=True,
    help="Look at pruning plans, compare them, check them, apply them.\n\n"
    "A plan is a small JSON file that says which units of which model stay. Where a command asks for a PLAN, the "
    "directory of a pruned checkpoint does too: its nirvana_plan.json is read.",
)

PlanPath = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan, or a pruned checkpoint.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of tables.")]
Force = Annotated[
    bool, typer.Option("--force", help="Accept another model of the same shape: compare sizes, not the digest.")
]


@app.command(epilog="Examples:\n\n  nirvana plan show artifacts/plan.json\n\n  nirvana plan show my-checkpoint --json")
def show(plan: PlanPath, as_json: AsJson = False) -> None:
    """Show what a plan removes: ratios by module, what stays of each layer, where it comes from."""
    content = Plan.read(plan)
    if as_json:
        typer.echo(json.dumps(summarise(content), indent=2))
        return
    from nirvana.cli import plan_tables

    plan_tables.show(plan, content)


@app.command(
    epilog="Examples:\n\n  nirvana plan diff before.json after.json\n\n"
    "  nirvana plan diff plan.json my-checkpoint --json\n\nExit status: 0 equal, 1 different, 2 trouble."
)
def diff(
    plan_a: Annotated[Path, typer.Argument(metavar="A", help="A plan, or a pruned checkpoint.", show_default=False)],
    plan_b: Annotated[Path, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Say what differs between two plans: settings, achieved ratios, and the units that only one of them keeps."""
    difference = diff_plans(Plan.read(plan_a), Plan.read(plan_b))
    if as_json:
        typer.echo(json.dumps(difference.as_json(), indent=2))
    else:
        from nirvana.cli import plan_tables

        plan_tables.diff(plan_a, plan_b, difference)
    if not difference.equal:
        raise typer.Exit(1)


@app.command(
    epilog="Examples:\n\n  nirvana plan apply artifacts/plan.json data/model --to my-checkpoint\n\n"
    "  nirvana plan apply artifacts/plan.json fine-tuned-copy --to my-checkpoint --force\n\n"
    "  nirvana plan apply artifacts/plan.json data/model --to my-checkpoint --calibration data/compensation.safetensors"
)
def apply(
    plan: PlanPath,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Directory of the dense model.", show_default=False)],
    to: Annotated[
        Path,
        typer.Option(
            metavar="DIRECTORY",
            help="Where the pruned checkpoint appears; an earlier one there is replaced, anything else refused.",
            show_default=False,
        ),
    ],
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The token ids that the plan's compensation is fitted on: needed where it has one (plan show).",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Write the pruned checkpoint that a plan describes: the same bytes every time, whole or not at all."""
    content = Plan.read(plan)
    if calibration is not None and content.compensation is None:
        raise InputError("--calibration: expected a plan with a compensation beside it, got one without; leave it out")
    import sys

    import transformers
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from nirvana.architectures.registry import read_config
    from nirvana.surgery import prune
    from nirvana.weights import WeightFiles, weight_files

    if not force:
        content.check_type(read_config(model).model_type)
    transformers.utils.logging.disable_progress_bar()  # of what is loaded to compare it
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        layers = progress.add_task("compensating layers", total=content.num_layers, visible=calibration is not None)
        tensors = progress.add_task("writing tensors", total=len(list(WeightFiles(model))))
        prune(
            model,
            content,
            to,
            on_tensor=lambda name: progress.advance(tensors),
            match_digest=not force,
            calibration=calibration,
            execution="streamed",  # each layer is read once anyway
            on_layer=lambda layer: progress.advance(layers),
            verified=True,
        )
    size = sum(file.stat().st_size for file in weight_files(to))
    dense = sum(file.stat().st_size for file in weight_files(model))
    typer.echo(f"wrote {printable(to)}: {size / 1e6:.1f} MB of weights, {size / dense:.1%} of the dense model's")


@app.command(
    epilog="Examples:\n\n  nirvana plan validate artifacts/plan.json\n\n"
    "  nirvana plan validate artifacts/plan.json --model data/model"
)
def validate(
    plan: PlanPath,
    model: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="Check that the plan fits this dense model too.", show_default=False),
    ] = None,
    force: Force = False,
) -> None:
    """Check a plan: its schema, its ranges, that its ratios are what its units come to, that it fits a model.

    Of a pruned checkpoint, every file is compared with the digest that was taken when it was written, and the sizes of
    configuration and weights with the plan.
    """
    if force and model is None:
        raise InputError("--force: expected --model beside it, got none; name the model that the plan shall fit")
    content = Plan.read(plan)
    fits = _whole(plan, content) if plan.is_dir() else ""
    if model is not None:
        from nirvana.walk import Stack
        from nirvana.weights import model_digest

        stack = Stack.open(model)
        sites = stack.architecture.sites()
        content.check_fits(sites, None if force else model_digest(model))
        if not force:
            content.check_type(stack.architecture.config.model_type)
        fits += f"; fits {printable(model)} by {'size' if force else 'digest'}"
    total = content.achieved_ratio["total"]
    typer.echo(f"valid: {printable(plan)} removes {total:.1%} of the block weights at {len(content.sites)} sites{fits}")


def _whole(checkpoint: Path, plan: Plan) -> str:
    """Check the files of a pruned checkpoint or an export, and return what the last line says of them."""
    from nirvana.checkpoint.digests import DIGESTS_NAME, check_digests

    listed = check_digests(checkpoint)
    if not (checkpoint / "nirvana_export.json").is_file():  # an export has sizes of its own
        from nirvana.walk import Stack

        plan.check_sizes(Stack.open(checkpoint).architecture.sites(), checkpoint)
    return "; files as written" if listed else f"; files not compared: no {DIGESTS_NAME} (an earlier release wrote it)"
