"""A tiny dense model with its pruned checkpoint, and exports of it, for tests."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import random_keep, save_family, tiny_tokenizer

from nirvana.allocation import Allocation
from nirvana.calibration import calibration_digest
from nirvana.checkpoint.digests import DIGESTS_NAME
from nirvana.export.export import Options, export_checkpoint
from nirvana.plan import PLAN_NAME, Compensation, Plan
from nirvana.surgery import prune
from nirvana.walk import Stack, as_streams
from nirvana.weights import model_digest


def slow_but(fast: tuple[str, ...], names: list[str]) -> list:
    """Mark all but some of a test's cases as slow."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def write_plan(root: Path, keep) -> Plan:
    """Write a random plan for the dense model into the checkpoint; `keep` says what some sites keep."""
    stack = Stack.open(root / "dense")
    sites = stack.architecture.sites()
    plan = Plan.build(
        sites,
        random_keep(sites) | keep,
        model_digest=model_digest(root / "dense"),
        model_type=stack.architecture.config.model_type,
        calibration_digest="sha256:none",
        allocation=Allocation(0.4, gamma=1.5, round_to=4),
    )
    (root / "pruned").mkdir(exist_ok=True)
    (root / "pruned" / DIGESTS_NAME).unlink(missing_ok=True)
    plan.write(root / "pruned" / PLAN_NAME)
    return plan


def make_checkpoint(name, root: Path) -> Path:
    """Save a dense model, its unit saliency and a pruned checkpoint of it, layers of different sizes, below `root`."""
    model = save_family(name, root / "dense")
    tiny_tokenizer().save_pretrained(model)
    sites = Stack.open(model).architecture.sites()
    generator = np.random.default_rng(0)
    saliency = {site.name: torch.from_numpy(generator.random(site.units, dtype=np.float32)) for site in sites}
    save_file(saliency, root / "saliency.safetensors")
    prune(model, write_plan(root, {sites[0].name: np.arange(sites[0].units)}), root / "pruned")
    return root


def with_compensation(plan: Plan, ids, file: Path, ridge: float = 0.1) -> Plan:
    """Save token ids; return the plan with a compensation that is fitted on them."""
    names = ("input_ids", "decoder_input_ids")
    save_file(dict(zip(names, as_streams(ids), strict=False)), file)
    return replace(plan, compensation=Compensation(ridge, calibration_digest(ids)))


def exported(root: Path, to: str, target: str | None = None, **arguments):
    options = arguments.pop("options", Options(saliency=root / "saliency.safetensors"))
    target_directory = root / (target or to)
    return export_checkpoint(root / "pruned", to, root / "dense", target_directory, options=options, **arguments)


def run_elsewhere(code: str, cwd: Path) -> str:
    """Run code in a clean process that cannot import nirvana: `-S`-like isolation by blocking the name."""
    blocked = "import sys; sys.modules['nirvana'] = None\n"
    environment = os.environ | {"HF_HOME": str(cwd / "hf"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", blocked + code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def left_over(root: Path) -> list[str]:
    """Return what lies beside the inputs, temporary siblings included."""
    return sorted(p.name for p in root.iterdir() if p.name not in ("dense", "pruned", "saliency.safetensors"))
