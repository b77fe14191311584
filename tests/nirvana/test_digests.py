"""A checkpoint of which one bit changed is told by name, wherever the bit is."""

import json

import pytest
from tiny import random_ids, random_keep, tiny_llama
from typer.testing import CliRunner

from nirvana.allocation import Allocation
from nirvana.calibration import calibration_digest
from nirvana.checkpoint.digests import DIGESTS_NAME, check_digests
from nirvana.cli import app
from nirvana.errors import InputError
from nirvana.export.export import export_checkpoint
from nirvana.files import sha256_file
from nirvana.plan import PLAN_NAME, Compensation, Plan
from nirvana.surgery import prune
from nirvana.walk import Stack
from nirvana.weights import model_digest


@pytest.fixture(params=[False, True], ids=["sliced", "compensated"])
def made(request, tmp_path):
    """A dense model and its pruned checkpoint, whose weights compensation has solved for or not."""
    from safetensors.torch import save_file

    dense, checkpoint = tiny_llama(tmp_path / "dense"), tmp_path / "pruned"
    ids = random_ids(4, 24)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    sites = Stack.open(dense).architecture.sites()
    plan = Plan.build(
        sites,
        random_keep(sites),
        model_digest=model_digest(dense),
        model_type="llama",
        calibration_digest="sha256:def",
        allocation=Allocation(0.4),
        compensation=Compensation(0.3, calibration_digest((ids,))) if request.param else None,
    )
    prune(dense, plan, checkpoint, calibration=tmp_path / "ids.safetensors" if request.param else None)
    return dense, checkpoint


def test_the_digests_are_of_the_files(made):
    _, checkpoint = made
    said = json.loads((checkpoint / DIGESTS_NAME).read_text())["sha256"]
    files = {file.name for file in checkpoint.iterdir()} - {DIGESTS_NAME}
    assert set(said) == files and {"model.safetensors", "config.json", PLAN_NAME, "tokenizer.json"} <= files
    assert said == {name: sha256_file(checkpoint / name) for name in files}  # read afresh, not while they were written
    assert check_digests(checkpoint)


def test_a_flipped_bit_of_any_file_is_told_by_validate_and_export(made, tmp_path):
    dense, checkpoint = made
    runner = CliRunner()
    whole = runner.invoke(app, ["plan", "validate", str(checkpoint), "--model", str(dense)])
    assert whole.exit_code == 0 and "; files as written; fits" in whole.output
    for file in sorted(checkpoint.iterdir()):
        content = file.read_bytes()
        damaged = bytearray(content)
        damaged[-5] ^= 1  # of the weights: the last bits of a float
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=file.name if file.name != DIGESTS_NAME else "expected"):
            export_checkpoint(checkpoint, "hf", dense, tmp_path / "exported")
        assert runner.invoke(app, ["plan", "validate", str(checkpoint)]).exit_code != 0, file.name
        file.write_bytes(content)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer.json: expected the file that was written here, found none"):
        check_digests(checkpoint)


def test_checkpoints_of_earlier_releases_are_valid_with_a_note(made):
    _, checkpoint = made
    (checkpoint / DIGESTS_NAME).unlink()
    done = CliRunner().invoke(app, ["plan", "validate", str(checkpoint)])
    assert done.exit_code == 0 and f"files not compared: no {DIGESTS_NAME}" in done.output


def test_sizes_that_differ_from_the_plan_are_refused_without_digests_too(made, tmp_path):
    dense, checkpoint = made
    (checkpoint / DIGESTS_NAME).unlink()
    plan = Plan.read(checkpoint)
    sites = Stack.open(dense).architecture.sites()
    other = Plan.build(
        sites,
        random_keep(sites, share=0.9),
        model_digest=plan.model_digest,
        model_type="llama",
        calibration_digest="c",
        allocation=Allocation(0.1),
    )
    other.write(checkpoint / PLAN_NAME)
    done = CliRunner().invoke(app, ["plan", "validate", str(checkpoint)])
    assert done.exit_code != 0 and "plan and weights do not belong together" in f"{done.exception} {done.output}"


def test_an_export_carries_digests_of_its_own(made, tmp_path):
    dense, checkpoint = made
    export_checkpoint(checkpoint, "hf", dense, tmp_path / "exported")
    assert check_digests(tmp_path / "exported")
    said = json.loads((tmp_path / "exported" / DIGESTS_NAME).read_text())["sha256"]
    assert "nirvana_export.json" in said
