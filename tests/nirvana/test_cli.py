"""The command line: what it prints, what it leaves, and one line when something is wrong."""

import errno
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from exports import with_compensation
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_ids, random_keep, save_family
from typer.testing import CliRunner

import nirvana.cli.plan
from nirvana import surgery
from nirvana.allocation import Allocation
from nirvana.cli import app
from nirvana.files import sha256_directory
from nirvana.plan import PLAN_NAME, Plan, counted_ratio
from nirvana.surgery import prune
from nirvana.walk import Stack
from nirvana.weights import model_digest


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error_line(result, status=2):
    """Return the one line that is all a failed command says."""
    assert result.exit_code == status, (result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.endswith("\n") and result.stderr.count("\n") == 1
    return result.stderr


def plan_for(model, keep):
    return Plan.build(
        Stack.open(model).architecture.sites(),
        keep,
        model_digest=model_digest(model),
        model_type="llama",
        calibration_digest="sha256:none",
        allocation=Allocation(0.25, gamma=2.0, round_to=4, rule="exact"),
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_family("llama", tmp_path_factory.mktemp("cli") / "dense")


@pytest.fixture(scope="module")
def keep(model):
    """One of two KV groups leaves layer 0, neurons 0 to 11 of 48 leave layer 2."""
    whole = {site.name: np.arange(site.units) for site in Stack.open(model).architecture.sites()}
    return whole | {"layers.0.kv_group": np.array([1]), "layers.2.mlp_neuron": np.arange(12, 48)}


@pytest.fixture
def plan(model, keep, tmp_path):
    plan_for(model, keep).write(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def edited(plan, target, change):
    value = json.loads(plan.read_text())
    change(value)
    target.write_text(json.dumps(value))
    return target


# -- show ----------------------------------------------------------------------------------------------------------


def test_show_by_hand(plan):
    shown = run("plan", "show", plan)
    assert shown.exit_code == 0, shown.stderr
    lines = [" ".join(line.split()) for line in shown.stdout.splitlines()]
    # attention: 3 layers of 2 groups of 1536 weights; MLP: 3 layers of 48 neurons of 96 weights
    asked = 0.25 * (9216 + 13824)
    attention, mlp = asked / (9216 + 2 * 13824), 2 * asked / (9216 + 2 * 13824)
    assert f"attention {attention:.2%} 16.67% 5 of 6 0.0077 of 0.0092 M" in lines
    assert f"mlp {mlp:.2%} 8.33% 132 of 144 0.013 of 0.014 M" in lines
    assert f"total 25.00% {(1536 + 1152) / 23040:.2%} 137 of 150 0.02 of 0.023 M" in lines
    assert "layers.0 █████░░░░░ 1/2 ██████████ 48/48" in lines
    assert "layers.2 ██████████ 2/2 ███████░░░ 36/48" in lines
    assert "pruning_ratio 0.25, ranking modules, gamma 2.0" in " ".join(shown.stdout.split())
    assert json.loads(plan.read_text())["model"]["digest"][:23] in shown.stdout


def test_show_for_machines(plan):
    shown = json.loads(run("plan", "show", plan, "--json").stdout)
    assert shown["modules"]["attention"]["achieved_ratio"] == 1 / 6
    assert shown["modules"]["total"]["kept_weights"] == 23040 - 1536 - 1152
    assert shown["modules"]["attention"]["requested_ratio"] == pytest.approx(0.25 * 23040 / (9216 + 2 * 13824))
    assert shown["sites"][0] == {
        "name": "layers.0.kv_group",
        "module": "attention",
        "layer": 0,
        "units": 2,
        "kept_units": 1,
        "weights": 3072,
        "kept_weights": 1536,
    }


def test_rates_are_capped_as_the_allocation_caps_them(plan, tmp_path):
    """Gamma 0.01 asks for 62 % of attention, but one group of two stays in every layer: the MLP gives the rest."""
    path = edited(plan, tmp_path / "capped.json", lambda v: v["allocation"].update(gamma=0.01))
    modules = json.loads(run("plan", "show", path, "--json").stdout)["modules"]
    assert modules["attention"]["requested_ratio"] == 0.5
    assert modules["mlp"]["requested_ratio"] == pytest.approx((0.25 * 23040 - 4608) / 13824)


def first_version(value, **parameters):
    """Write a plan as releases before schema version 2 did."""
    value |= {"schema_version": 1, "requested_ratio": 0.25, "parameters": {"pruning_ratio": 0.25, **parameters}}
    del value["allocation"]


def test_show_without_gamma_leaves_the_modules_open(plan, tmp_path):
    path = edited(plan, tmp_path / "other.json", first_version)
    assert json.loads(run("plan", "show", path, "--json").stdout)["modules"]["mlp"]["requested_ratio"] is None
    assert run("plan", "show", path).exit_code == 0


def test_a_checkpoint_stands_for_its_plan(plan, model, tmp_path):
    prune(model, Plan.read(plan), tmp_path / "pruned")
    assert surgery.PLAN_NAME == PLAN_NAME
    assert run("plan", "show", tmp_path / "pruned", "--json").stdout == run("plan", "show", plan, "--json").stdout
    assert run("plan", "diff", plan, tmp_path / "pruned").exit_code == 0


def test_a_plan_cannot_steer_the_terminal(plan, tmp_path):
    path = edited(plan, tmp_path / "x.json", lambda v: v["parameters"].update({"note": "\x1b[2J[red]", "\x1b[2K": 1}))
    shown = run("plan", "show", path)
    assert shown.exit_code == 0 and "\x1b" not in shown.stdout and "[red]" in shown.stdout
    assert "\x1b" not in run("plan", "diff", plan, path).stdout
    path = edited(plan, tmp_path / "y.json", lambda v: v["model"].update(digest="\x1b[2J"))
    assert "\x1b" not in error_line(run("plan", "show", path))
    assert "\x1b" not in error_line(run("plan", "show", tmp_path / "no\n\x1b[2Jsuch"))


def test_a_name_that_is_not_text(plan):
    odd = plan.with_name("odd\udcff\x1b.json")  # how Python reads bytes that are not UTF-8
    plan.rename(odd)
    assert "odd\\udcff\\x1b.json" in run("plan", "validate", odd).stdout
    assert run("plan", "show", odd).exit_code == 0


# -- diff ----------------------------------------------------------------------------------------------------------


def test_equal_plans(plan):
    same = run("plan", "diff", plan, plan)
    assert (same.exit_code, same.stderr) == (0, "") and same.stdout.startswith("equal: ")
    assert json.loads(run("plan", "diff", plan, plan, "--json").stdout)["equal"] is True


def test_diff_by_hand(plan, tmp_path):
    a = Plan.read(plan)
    sites = tuple(
        replace(site, keep_indices=np.arange(6, 42)) if site.name == "layers.2.mlp_neuron" else site for site in a.sites
    )
    changed = {"allocation": replace(a.allocation, gamma=3.0), "parameters": {"note": "by hand"}}
    b = replace(a, sites=sites, achieved_ratio=counted_ratio(sites), **changed)
    b.write(tmp_path / "b.json")
    result = run("plan", "diff", plan, tmp_path / "b.json", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["settings"] == {
        "allocation.gamma": {"a": 2.0, "b": 3.0},
        "parameters.note": {"b": "by hand"},
    }
    assert found["sites"] == [
        {
            "name": "layers.2.mlp_neuron",
            "module": "mlp",
            "units": {"a": 48, "b": 48},
            "kept_in_both": 30,
            "only_in_a": "42-47",
            "only_in_b": "6-11",
        }
    ]
    assert found["overlap"] == {"total": 131 / 143, "attention": 1.0, "mlp": 126 / 138}
    shown = run("plan", "diff", plan, tmp_path / "b.json")
    lines = [" ".join(line.split()) for line in shown.stdout.splitlines()]
    assert shown.exit_code == 1
    assert "layers.2.mlp_neuron 30 6: 42-47 6: 6-11" in lines
    assert "parameters.note - by hand" in lines


def test_plans_of_two_models_differ_by_site(plan, tmp_path):
    def drop(value):
        value["sites"] = [site for site in value["sites"] if site["layer"] < 2]
        value["model"]["num_layers"] = 2
        value["achieved_ratio"] = {"total": 1536 / 15360, "attention": 0.25, "mlp": 0.0}

    found = json.loads(run("plan", "diff", plan, edited(plan, tmp_path / "b.json", drop), "--json").stdout)
    assert [(site["name"], site["only_in_a"], site["units"]) for site in found["sites"]] == [
        ("layers.2.kv_group", "0-1", {"a": 2, "b": None}),
        ("layers.2.mlp_neuron", "12-47", {"a": 48, "b": None}),
    ]
    assert run("plan", "diff", plan, tmp_path / "b.json").exit_code == 1


def test_true_is_not_one(plan, tmp_path):
    a = edited(plan, tmp_path / "a.json", lambda v: v["parameters"].update(flag=True))
    b = edited(plan, tmp_path / "b.json", lambda v: v["parameters"].update(flag=1))
    assert run("plan", "diff", a, b).exit_code == 1


# -- apply ---------------------------------------------------------------------------------------------------------


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.05, 1))
def test_apply_rebuilds_the_same_bytes(model, tmp_path_factory, seed, share):
    folder = tmp_path_factory.mktemp("apply")
    plan = plan_for(model, random_keep(Stack.open(model).architecture.sites(), seed, share))
    plan.write(folder / "plan.json")
    for name in ("once", "twice"):
        done = run("plan", "apply", folder / "plan.json", model, "--to", folder / name)
        assert (done.exit_code, done.stderr) == (0, "") and done.stdout.startswith(f"wrote {folder / name}: ")
    prune(model, plan, folder / "pruned")
    assert len({sha256_directory(folder / name) for name in ("once", "twice", "pruned")}) == 1


def test_a_linked_model_gives_the_same_bytes(plan, model, tmp_path):
    """A snapshot in Hugging Face's cache holds links to its blobs."""
    repository = tmp_path / "models--acme--tiny"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    shutil.copytree(model, repository / "blobs")
    for file in model.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    for name, source in (("a", model), ("b", snapshot)):
        assert run("plan", "apply", plan, source, "--to", tmp_path / name).exit_code == 0
    assert sha256_directory(tmp_path / "a") == sha256_directory(tmp_path / "b")


def test_another_model_needs_force(plan, tmp_path):
    other = save_family("llama", tmp_path / "other", seed=1)
    arguments = ("plan", "apply", plan, other, "--to", tmp_path / "pruned")
    assert "expected the model sha256:" in error_line(run(*arguments))
    assert not (tmp_path / "pruned").exists()
    assert run(*arguments, "--force").exit_code == 0
    assert (tmp_path / "pruned" / PLAN_NAME).exists()


def test_force_does_not_accept_another_shape(plan, tmp_path):
    other = save_family("llama-mha", tmp_path / "other")
    refused = run("plan", "apply", plan, other, "--to", tmp_path / "pruned", "--force")
    assert "got one with 4 units" in error_line(refused)
    assert not (tmp_path / "pruned").exists()


@pytest.fixture
def compensated(plan, tmp_path):
    """The plan with a compensation, and the file it is fitted on."""
    file = tmp_path / "ids.safetensors"
    with_compensation(Plan.read(plan), random_ids(4, 8), file, 0.25).write(tmp_path / "compensated.json")
    return tmp_path / "compensated.json", file


def test_apply_compensates(compensated, model, tmp_path):
    path, file = compensated
    applied = run("plan", "apply", path, model, "--to", tmp_path / "applied", "--calibration", file)
    assert (applied.exit_code, applied.stderr) == (0, "")
    prune(model, Plan.read(path), tmp_path / "pruned", calibration=file)
    assert sha256_directory(tmp_path / "applied") == sha256_directory(tmp_path / "pruned")


def test_apply_asks_for_the_calibration_file(compensated, plan, model, tmp_path):
    path, file = compensated
    arguments = (model, "--to", tmp_path / "pruned")
    assert "give it: --calibration FILE" in error_line(run("plan", "apply", path, *arguments))
    refused = run("plan", "apply", plan, *arguments, "--calibration", file)
    assert "--calibration: expected a plan with a compensation" in error_line(refused)
    for odd in (tmp_path, tmp_path / "none", plan):
        refused = run("plan", "apply", path, *arguments, "--calibration", odd)
        assert "expected token ids, got a file that cannot be read" in error_line(refused)
    assert not (tmp_path / "pruned").exists()


def test_show_and_diff_tell_the_compensation(compensated, plan):
    path, _ = compensated
    digest = Plan.read(path).compensation.calibration_digest
    for file, said in ((plan, "none"), (path, f"ridge 0.25, fitted on {digest[:23]}")):
        lines = [" ".join(line.split()) for line in run("plan", "show", file).stdout.splitlines()]
        assert f"compensation {said}" in lines
    shown = json.loads(run("plan", "show", path, "--json").stdout)
    assert shown["compensation"] == {"ridge": 0.25, "calibration_digest": digest}
    assert json.loads(run("plan", "show", plan, "--json").stdout)["compensation"] is None
    settings = json.loads(run("plan", "diff", plan, path, "--json").stdout)["settings"]
    assert settings == {"compensation.ridge": {"b": 0.25}, "compensation.calibration_digest": {"b": digest}}
    lines = [" ".join(line.split()) for line in run("plan", "diff", plan, path).stdout.splitlines()]
    assert "compensation.ridge - 0.25" in lines and f"compensation.calibration_digest - {digest[:23]}" in lines


# -- validate ------------------------------------------------------------------------------------------------------


def test_valid(plan, model):
    alone, fits = run("plan", "validate", plan), run("plan", "validate", plan, "--model", model)
    assert alone.stdout == f"valid: {plan} removes 11.7% of the block weights at 6 sites\n"
    assert fits.stdout == f"{alone.stdout.strip()}; fits {model} by digest\n"


def test_validate_compares_models(plan, tmp_path):
    other = save_family("llama", tmp_path / "other", seed=1)
    assert "expected the model sha256:" in error_line(run("plan", "validate", plan, "--model", other))
    assert run("plan", "validate", plan, "--model", other, "--force").stdout.endswith("by size\n")
    assert "expected --model beside it" in error_line(run("plan", "validate", plan, "--force"))


def test_a_ratio_that_the_units_do_not_come_to_is_refused_by_every_command(plan, model, tmp_path):
    """One neuron put back by hand; the message says what to write."""

    def put_back(value):
        value["sites"][-1]["keep"] = "11-47"

    path = edited(plan, tmp_path / "edited.json", put_back)
    for rest in (["show"], ["validate"], ["diff", plan], ["apply", model, "--to", tmp_path / "pruned"]):
        line = error_line(run("plan", rest[0], path, *rest[1:]))
    counted = json.loads(line.split("achieved_ratio: expected ")[1].split("}")[0] + "}")
    assert counted == {"total": (1536 + 11 * 96) / 23040, "attention": 1 / 6, "mlp": 11 / 144}
    mended = edited(path, tmp_path / "mended.json", lambda v: v.update(achieved_ratio=counted))
    assert run("plan", "validate", mended).exit_code == 0


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "show"], "Missing argument 'PLAN'; `nirvana plan show --help` shows how"),
        (["plan", "shwo"], "Did you mean 'show'"),
        (["plan", "show", "none.json"], "none.json: expected a JSON file, found nothing"),
        (["plan", "show", "."], "expected a plan or a pruned checkpoint with nirvana_plan.json"),
        (["plan", "show", "x" * 5000], "File name too long"),
        (["plan", "diff", "none.json", "none.json"], "found nothing"),
        (["plan", "apply", "none.json", "model"], "Missing option '--to'"),
        (["--nonsense"], "No such option"),
    ],
)
def test_bad_arguments(arguments, said):
    result = CliRunner().invoke(app, arguments, prog_name="nirvana")
    assert said in error_line(result)


def test_help_is_enough_to_start():
    for arguments in ([], ["plan"], ["plan", "show"], ["plan", "diff"], ["plan", "apply"], ["plan", "validate"]):
        shown = run(*arguments, "--help")
        assert shown.exit_code == 0
        assert "nirvana plan" in shown.stdout, arguments
    assert run("--version").stdout.startswith("nirvana 0.")
    assert "Commands" in run().stdout and run().exit_code == 2


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 2, "/x: expected room to write, got a full disk"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "/x: expected to read or write this"),
        (MemoryError(), 2, "expected more free memory"),
        (KeyError("a\nb"), 3, "got KeyError: 'a\\nb'; this is a defect of nirvana"),
        (KeyboardInterrupt(), 130, None),
    ],
)
def test_what_commands_do_not_expect(plan, monkeypatch, error, status, said):
    def fail(path):
        raise error

    monkeypatch.setattr(nirvana.cli.plan.Plan, "read", fail)
    result = run("plan", "show", plan)
    if said is None:
        assert result.exit_code == status
    else:
        assert said in error_line(result, status)


def test_a_defect_shows_its_traceback_when_asked(plan, monkeypatch):
    monkeypatch.setenv("NIRVANA_TRACEBACK", "1")
    assert isinstance(run("plan", "show", plan.with_name("none")).exception, ValueError)


def command(*arguments, **options):
    code = "import sys; from nirvana.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], text=True, timeout=60, **options)


def test_full_disk_behind_the_output(plan):
    with Path("/dev/full").open("w") as full:
        done = command("plan", "show", plan, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr.startswith("error: expected room to write, got a full disk") and done.stderr.count("\n") == 1


def test_a_process_says_one_line(tmp_path):
    done = command("plan", "show", tmp_path / "none.json", capture_output=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_starting_imports_nothing_heavy():
    code = "import sys, nirvana.cli; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'safetensors')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
