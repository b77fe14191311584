"""The environment that `make` sets up: the old one stays until the new one stands."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]

# a package without dependencies that builds itself, so that no index is needed
_BACKEND = """
import zipfile
def build_editable(directory, config_settings=None, metadata_directory=None):
    name = "toy-1-py3-none-any.whl"
    info = "toy-1.dist-info"
    files = {
        "toy_module.py": "def main():\\n    print('works')\\n",
        f"{info}/METADATA": open("metadata").read(),
        f"{info}/WHEEL": "Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
        f"{info}/entry_points.txt": "[console_scripts]\\ntoy = toy_module:main\\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(f"{directory}/{name}", "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)
    return name
"""
_METADATA = "Metadata-Version: 2.1\nName: toy\nVersion: 1\nProvides-Extra: pipeline\nProvides-Extra: dev\n"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("make") / "a checkout"
    path.mkdir()
    shutil.copyfile(ROOT / "Makefile", path / "Makefile")
    (path / "constraints.txt").touch()
    (path / "backend.py").write_text(_BACKEND)
    (path / "metadata").write_text(_METADATA)
    (path / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    return path


def setup(path: Path) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON", "VIRTUAL"))}
    command = ["make", "setup", f"PYTHON={Path(sys.base_prefix) / 'bin/python3'}"]
    variables = kept | {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return subprocess.run(command, cwd=path, env=variables, capture_output=True, text=True, timeout=300, check=False)


def works(path: Path) -> bool:
    done = subprocess.run([path / ".venv/bin/toy"], capture_output=True, text=True, check=False)
    prefix = subprocess.run(
        [path / ".venv/bin/python", "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True, check=True
    )
    return done.stdout == "works\n" and prefix.stdout.strip() == str(path / ".venv")


def leftovers(path: Path) -> list[str]:
    return sorted(each.name for each in path.glob(".venv*"))


def test_an_environment_is_made_anew_and_one_that_cannot_be_made_leaves_the_old(checkout: Path) -> None:
    done = setup(checkout)
    assert done.returncode == 0, done.stderr
    assert works(checkout) and leftovers(checkout) == [".venv"]
    assert "up to date" in setup(checkout).stdout or setup(checkout).returncode == 0

    # a newer pyproject.toml asks for what cannot be had
    marker = checkout / ".venv/marker"
    marker.touch()
    time.sleep(1.1)
    (checkout / "metadata").write_text(_METADATA + "Requires-Dist: no-such-package-at-all\n")
    (checkout / "pyproject.toml").touch()
    done = setup(checkout)
    assert done.returncode == 2
    assert (
        "error: expected pip to set up a new environment, it failed (see above); the old .venv is as it was"
        in done.stderr
    )
    assert works(checkout) and marker.exists() and leftovers(checkout) == [".venv"]

    # and when it can be had, the new one takes its place
    (checkout / "metadata").write_text(_METADATA)
    done = setup(checkout)
    assert done.returncode == 0, done.stderr
    assert works(checkout) and not marker.exists() and leftovers(checkout) == [".venv"]

    # killed between the two moves
    (checkout / ".venv").rename(checkout / ".venv.old")
    (checkout / "metadata").write_text(_METADATA + "Requires-Dist: no-such-package-at-all\n")
    assert setup(checkout).returncode == 2
    assert works(checkout)
