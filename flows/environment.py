"""The environment of everything that drives: quiet, offline, histories in the checkout. Import before prefect.

What the user has set stays. PREFECT_API_URL and MLFLOW_TRACKING_URI send the same run to a team's servers.
"""

import json
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from tasks.tracking.loopback import keep_loopback_direct
from tasks.tracking.redaction import redact, redact_logs

ROOT = Path(__file__).resolve().parent.parent

_QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",
}


def ui_file() -> Path:
    """Return the file in which `make ui` says where its Prefect server listens."""
    return Path(os.environ.get("PREFECT_HOME", ROOT / ".prefect")) / "ui.json"


def prepare() -> None:
    """Set the defaults; a running `make ui` becomes the Prefect server of this process."""
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    keep_loopback_direct()
    redact_logs()
    if not {"PREFECT_HOME", "PREFECT_API_URL"} & os.environ.keys():
        os.environ["PREFECT_HOME"] = str(ROOT / ".prefect")
    if "PREFECT_API_URL" not in os.environ and (url := _running_ui()):
        os.environ["PREFECT_API_URL"] = url
    # DVC runs `python -m tasks STEP`: with this interpreter, whatever the user's PATH says
    interpreters = str(Path(sys.executable).parent)
    if os.environ.get("PATH", "").split(os.pathsep)[0] != interpreters:
        os.environ["PATH"] = os.pathsep.join([interpreters, os.environ.get("PATH", os.defpath)])


def _running_ui() -> str | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        said = json.loads(ui_file().read_text(encoding="utf-8"))
        os.kill(said["pid"], 0)
        address = urlsplit(said["api"])
        with socket.create_connection((address.hostname, address.port), timeout=1):
            return str(said["api"])
    return None


def _read_settings() -> None:
    """Import Prefect, which checks its PREFECT_... variables then; one line where one of them cannot be."""
    try:
        from prefect import flow  # noqa: F401
    except ValueError as error:  # pydantic's; its second and third lines name the first variable and what is expected
        said = redact("; ".join(line.strip() for line in str(error).splitlines()[1:3]))
        sys.exit(f"error: expected PREFECT_... variables and settings that Prefect takes, got {said}; correct them")


prepare()
_read_settings()
