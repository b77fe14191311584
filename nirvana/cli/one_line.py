"""Whatever goes wrong on the command line becomes one line on stderr and an exit status, never a traceback."""

import errno
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TextIO

import typer
from typer.core import TyperGroup

from nirvana.errors import InputError

BAD_INPUT, DEFECT, INTERRUPTED = 2, 3, 130
TRACEBACK_VARIABLE = "NIRVANA_TRACEBACK"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LONGEST_LINE = 2000  # characters
_UsageError: type[Any] = typer.BadParameter.__mro__[1]  # typer does not export it


class OneLineErrors(TyperGroup):
    """The group at the top: `error: <what, and what to do>` and exit status 2 for bad input of any command."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command and leave with its exit status; without `standalone_mode`, as typer does."""
        run = partial(super().main, args, prog_name, complete_var, False, windows_expand_args, **extra)
        if not standalone_mode:
            return run()
        try:
            result = run()
            sys.stdout.flush()
            status, line = result if isinstance(result, int) else 0, None
        except Exception as error:
            if os.environ.get(TRACEBACK_VARIABLE):
                raise
            status, line = _explained(error)
        if line:
            with suppress(OSError):
                sys.stderr.write(f"error: {_one_line(line)}\n")
        sys.exit(status)


def _explained(error: Exception) -> tuple[int, str | None]:
    """Return the exit status for an exception and what to say about it."""
    if isinstance(error, InputError):
        return BAD_INPUT, str(error)
    if isinstance(error, _UsageError):
        said = error.format_message()
        # no arguments at all: the help that was asked for by that is printed already
        return BAD_INPUT, f"{said.rstrip('.')}; `{_command_of(error)} --help` shows how" if said else None
    if isinstance(error, typer.Abort):
        return INTERRUPTED, "interrupted; nothing half-written is left"
    if isinstance(error, MemoryError):
        return BAD_INPUT, "expected more free memory for this, got none; close other programs or use a larger machine"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in _DISK_ERRORS:
            return BAD_INPUT, f"{where}expected room to write, got a full disk ({error.strerror}); free some space"
        return (
            BAD_INPUT,
            f"{where}expected to read or write this, got: {error.strerror or error}; check path and rights",
        )
    return DEFECT, (
        f"expected to handle this, got {type(error).__name__}: {error}; this is a defect of nirvana: "
        f"{TRACEBACK_VARIABLE}=1 and the same command show where"
    )


def _command_of(error: Any) -> str:
    return error.ctx.command_path if error.ctx else "nirvana"


def _one_line(text: str) -> str:
    line = " ".join(part.strip() for part in text.splitlines())
    if len(line) > _LONGEST_LINE:
        line = f"{line[: _LONGEST_LINE // 2]} ... {line[-_LONGEST_LINE // 2 :]}"
    return printable(line)


def printable(text: object) -> str:
    """Return a text in which nothing can steer the terminal, whatever a file or its name holds."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def release_output(stream: TextIO) -> None:
    """Write what a stream still holds; where that fails, forget it, so that Python's exit does not complain again."""
    try:
        stream.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
