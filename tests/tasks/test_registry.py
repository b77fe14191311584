"""dvc.yaml says what the code says: rendered from the registry, with every imported file among the dependencies."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tasks import registry
from tasks.params import SECTIONS
from tasks.provenance.code_files import HOW_NOT_WHAT, code_files

ROOT = Path(__file__).resolve().parents[2]
NAMES = [step.name for step in registry.STEPS]


def test_dvc_yaml_is_what_the_registry_renders() -> None:
    rendered = registry.render(ROOT)
    assert (ROOT / "dvc.yaml").read_text(encoding="utf-8") == rendered, "run `python -m tasks --render`"
    assert rendered == registry.render(ROOT)


def test_each_input_is_an_output_of_an_earlier_step() -> None:
    known: set[str] = set()
    for step in registry.STEPS:
        assert set(step.inputs) <= known, step.name
        assert not known & set(step.outs), step.name
        known |= set(step.outs)


def test_no_step_depends_on_runtime_and_every_key_exists() -> None:
    for step in registry.STEPS:
        for key in step.params:
            section, _, field = key.partition(".")
            assert section != "runtime"
            assert not field or field in SECTIONS[section].__annotations__, key


def test_allocation_stays_off_the_backward_pass_and_evaluation_off_all_else() -> None:
    stages = yaml.safe_load(registry.render(ROOT))["stages"]

    def reached_from(section: str) -> set[str]:
        changed = {name for name, s in stages.items() if any(p.split(".")[0] == section for p in s.get("params", []))}
        while True:
            outs = {
                out for name in changed for out in [*stages[name].get("outs", []), *stages[name].get("metrics", [])]
            }
            more = changed | {name for name, stage in stages.items() if outs & set(stage["deps"])}
            if more == changed:
                return changed
            changed = more

    assert reached_from("evaluation") == {"evaluate", "evaluate_dense", "report", "record"}
    assert not reached_from("allocation") & {"collect_gradients", "aggregate_saliency", "evaluate_dense"}
    assert reached_from("recovery") == {"recover", "evaluate", "benchmark", "report", "record"}
    assert reached_from("benchmark") == {"benchmark", "report", "record"}


IMPORTS = """
import json, os, sys, importlib
import transformers, torch  # once: each fork below starts from here
for name in sys.argv[1:]:
    if os.fork() == 0:
        importlib.import_module("tasks." + name)
        ours = [m for n, m in sorted(sys.modules.items()) if n.split(".")[0] in ("nirvana", "tasks", "flows")]
        print(json.dumps([name, [m.__file__ for m in ours if getattr(m, "__file__", None)]]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, name
"""


@pytest.mark.slow
def test_every_module_that_a_step_imports_is_a_dependency() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, *NAMES], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    imported_by = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert list(imported_by) == NAMES
    for name, files in imported_by.items():
        imported = {Path(file).relative_to(ROOT).as_posix() for file in files}
        # the packages' own files hold no logic; a hook on transformers brings in the pruned classes, needed or not
        imported -= {"nirvana/__init__.py", "tasks/__init__.py"}
        imported -= {"nirvana/checkpoint/__init__.py", "nirvana/checkpoint/modeling_nirvana.py"}
        imported = {file for file in imported if not set(Path(file).parents) & set(HOW_NOT_WHAT)}
        declared = set(registry.stage(registry.step(name), ROOT)["deps"])
        assert imported <= declared, (name, imported - declared)
        assert f"tasks/{name}.py" in declared
        assert not any(file.startswith("flows/") for file in imported), name


def test_steps_that_load_a_pruned_checkpoint_depend_on_its_classes() -> None:
    for name in ("recover", "evaluate", "benchmark"):
        assert "nirvana/checkpoint/modeling_nirvana.py" in registry.stage(registry.step(name), ROOT)["deps"]


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        file = root / name.replace("__", "/")
        file = file.with_suffix(".py") if not file.suffix else file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def test_code_files_follow_modules_found_by_name(tmp_path: Path) -> None:
    write(
        tmp_path,
        tasks__step="import importlib\nf = lambda name: importlib.import_module(f'nirvana.families.{name}')\n",
        nirvana__families__one="import nirvana.leaf\n",
        nirvana__families__two="",
        nirvana__leaf="",
    )
    found = code_files("tasks/step.py", tmp_path)
    assert found == ["nirvana/families/one.py", "nirvana/families/two.py", "nirvana/leaf.py", "tasks/step.py"]


def test_code_files_follow_imports_wherever_they_stand(tmp_path: Path) -> None:
    write(
        tmp_path,
        tasks__step="from nirvana import walk\ndef f():\n  from nirvana.deep.leaf import x\n  import tasks.helper\n",
        nirvana__walk="import nirvana.errors, json\n",
        nirvana__errors="",
        nirvana__deep__leaf="from . import sibling\nfrom ..other import y\n",
        nirvana__deep__sibling="",
        nirvana__other="",
        nirvana__unused="",
        tasks__helper="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tasks.params import Params\n",
        tasks__params="",
    )
    for package in ("nirvana", "tasks", "nirvana/deep"):
        (tmp_path / package / "__init__.py").write_text("", encoding="utf-8")
    assert code_files("tasks/step.py", tmp_path) == [
        "nirvana/deep/__init__.py",
        "nirvana/deep/leaf.py",
        "nirvana/deep/sibling.py",
        "nirvana/errors.py",
        "nirvana/other.py",
        "nirvana/walk.py",
        "tasks/helper.py",
        "tasks/step.py",
    ]


def test_a_template_named_in_the_code_is_a_dependency(tmp_path: Path) -> None:
    write(tmp_path, tasks__step='TEMPLATE = "page.html"\nOTHER = "absent.html"\n')
    (tmp_path / "tasks/templates").mkdir()
    (tmp_path / "tasks/templates/page.html").write_text("", encoding="utf-8")
    assert code_files("tasks/step.py", tmp_path) == ["tasks/step.py", "tasks/templates/page.html"]


def test_a_name_that_the_package_only_passes_on_is_refused(tmp_path: Path) -> None:
    write(tmp_path, tasks__step="from nirvana import prune\n")
    with pytest.raises(ValueError, match="import prune from the module that defines it"):
        code_files("tasks/step.py", tmp_path)
