"""What the README shows is run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_llama

README = Path(__file__).parents[1] / "README.md"


def python_blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.slow
def test_library_example_then_checkpoint_example(tmp_path):
    tiny_llama(tmp_path / "data" / "model")
    load, library = python_blocks()
    done = subprocess.run([sys.executable, "-c", library], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "pruned").rename(tmp_path / "artifacts" / "checkpoint")
    done = subprocess.run(
        [sys.executable, "-c", load + "print(model.num_parameters())"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 36_000


@pytest.mark.parametrize("link", re.findall(r"\]\((docs/[^)]*)\)", README.read_text(encoding="utf-8")))
def test_links_lead_somewhere(link):
    file, _, anchor = link.partition("#")
    text = (README.parent / file).read_text(encoding="utf-8") if anchor else ""
    assert (README.parent / file).exists()
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    assert not anchor or anchor in {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}


def test_make_targets_exist():
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make (\w+)|`make (\w+)`", README.read_text(encoding="utf-8"), flags=re.MULTILINE)):
        assert re.search(rf"^{''.join(target)}:", makefile, flags=re.MULTILINE)
