"""Run the pipeline on a schedule: `python -m flows.serve --cron "0 2 * * *"`, until Ctrl-C."""

import os
import signal
import sys
from contextlib import ExitStack
from typing import Annotated

import flows.environment  # noqa: F401  (before prefect, which reads it when imported)

# isort: split
import typer
from prefect.client.schemas.schedules import CronSchedule
from prefect.schedules import Cron, Schedule
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.pipeline import pipeline
from flows.server import PREFECT_PORT, page, prefect_server
from nirvana.errors import InputError
from tasks.workers.process import ERROR_PREFIX

NIGHTLY = "0 2 * * *"


def main(
    cron: Annotated[str, typer.Option(help="When: minute, hour, day, month, weekday.")] = NIGHTLY,
    timezone: Annotated[str, typer.Option(help="The time zone of the schedule, e.g. Europe/Berlin.")] = "UTC",
    prefect_port: Annotated[int, typer.Option(help="Port of the Prefect server that this starts.")] = PREFECT_PORT,
) -> None:
    """Schedule the pipeline. Uses PREFECT_API_URL or a running `make ui`, else starts a server that schedules."""
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        schedule = _schedule(cron, timezone)
        with ExitStack() as servers:
            url = os.environ.get("PREFECT_API_URL")
            if not url:
                typer.echo("starting a Prefect server, about half a minute ...")
                url = servers.enter_context(prefect_server(prefect_port))
                os.environ["PREFECT_API_URL"] = url
            typer.echo(f"schedule {cron!r} ({timezone}), page {page(url)}; Ctrl-C stops it")
            servers.enter_context(temporary_settings({PREFECT_API_URL: url}))
            # one run at a time: a second would only wait for the first one's files
            pipeline.serve(name="scheduled", schedule=schedule, limit=1, pause_on_shutdown=True)
    except InputError as error:
        sys.stderr.write(f"{ERROR_PREFIX}{error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("stopped")


def _schedule(cron: str, timezone: str) -> Schedule:
    try:
        CronSchedule(cron=cron, timezone=timezone)  # `Cron` itself checks nothing
        return Cron(cron, timezone=timezone)
    except ValueError:
        raise InputError(
            f"--cron, --timezone: expected five fields such as {NIGHTLY!r} and a zone such as UTC, "
            f"got {cron!r} and {timezone!r}; correct them"
        ) from None


if __name__ == "__main__":
    typer.run(main)
