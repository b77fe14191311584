"""Every study's flow: what cannot be is one line, and nothing is left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def ran(study, home, *options):
    variables = os.environ | {"PREFECT_HOME": str(home), "PYTHONPATH": str(ROOT)}
    variables.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", f"flows.{study}", *options]
    return subprocess.run(command, cwd=home, env=variables, capture_output=True, text=True, timeout=900, check=False)


def test_an_option_that_cannot_be_is_one_line(tmp_path):
    done = ran("compare", tmp_path, "--ratios=2")
    assert done.returncode == 1 and done.stderr.startswith("error: --ratios: expected") and done.stderr.count("\n") == 1
    done = ran("study", tmp_path, "flop")
    assert done.returncode == 1 and done.stderr.startswith("error: expected a study of alignment, attention_factor")


def test_a_text_that_is_not_there_is_one_line(tmp_path):
    done = ran("modules", tmp_path, "--quick", "--ids=ids", "--model=model")
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert line == f"error: {tmp_path}/ids/calibration_ids.json: expected a JSON file, found nothing; run the step that writes it"  # fmt: skip  # noqa: E501
    assert done.returncode == 1 and "Traceback" not in done.stderr and "Traceback" not in done.stdout
