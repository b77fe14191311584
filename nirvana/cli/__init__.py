"""The `nirvana` command: a thin layer over the library's functions.

A command is a plain function with annotated arguments: `app.command()(function)` adds it, `app.add_typer(other,
name=...)` adds a group. Its module is imported whenever `nirvana` starts, so torch and transformers are imported inside
the function. Bad input is an `InputError`, which `OneLineErrors` turns into a line and an exit status.
"""

import os
import sys
import warnings
from typing import Annotated

import typer

from nirvana.cli import estimate, export, plan
from nirvana.cli.one_line import OneLineErrors, release_output

_QUIET = {
    "HF_HUB_OFFLINE": "1",  # a model is a directory here, never a name to look up
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}

app = typer.Typer(
    name="nirvana",
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog="Start here:\n\n  nirvana plan show artifacts/plan.json\n\n  nirvana plan apply --help\n\n"
    "Exit status: 0 done, 1 `plan diff` found differences, 2 bad input or a full disk, 3 a defect of nirvana.",
)
app.add_typer(plan.app, name="plan")
app.command(epilog=export.EPILOG)(export.export)
app.command(epilog=estimate.EPILOG)(estimate.estimate)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"nirvana {version('nirvana-pruning')}")
        raise typer.Exit


@app.callback()
def nirvana(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Structured pruning of language models: what it will take, plans to look at and apply, checkpoints to export."""


def main() -> int:
    """Run the command line and return its exit status."""
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    warnings.simplefilter("ignore")  # of libraries, on the stream that carries our one line
    try:
        app(prog_name="nirvana")
    except SystemExit as leaving:
        return int(leaving.code or 0)
    finally:
        release_output(sys.stdout)
    return 0
