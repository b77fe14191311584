"""Surgery against copying a file of the size it writes."""

import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.common import Measurement, alternate
from nirvana.allocation import Allocation, allocate
from nirvana.files import atomic_file
from nirvana.plan import Plan
from nirvana.surgery import prune
from nirvana.walk import Stack


def measure(model: Path, repeats: int) -> list[Measurement]:
    """Return the time of pruning to ratio 0.4, less hashing the model, and of an equally durable file copy."""
    sites = Stack.open(model).architecture.sites()
    generator = np.random.default_rng(0)
    saliency = {site.name: generator.lognormal(0, 1, site.units).astype(np.float32) for site in sites}
    plan = Plan.build(
        sites,
        allocate(sites, saliency, Allocation(0.4, gamma=3.36)),
        model_digest="",
        model_type="",
        calibration_digest="",
        allocation=Allocation(0.4),
    )
    with tempfile.TemporaryDirectory(dir=".") as root:
        target, copy = Path(root) / "pruned", Path(root) / "copy"

        def copy_file() -> None:
            with atomic_file(copy) as temporary:
                shutil.copyfile(target / "model.safetensors", temporary)

        prune(model, plan, target, match_digest=False)
        ways = {"surgery": lambda: prune(model, plan, target, match_digest=False), "copy": copy_file}
        seconds = alternate(ways, repeats, clock=time.perf_counter)
    return [
        Measurement("surgery time, file copy", seconds["copy"], "s"),
        Measurement("surgery time, prune", seconds["surgery"], "s"),
        Measurement("surgery time, prune / file copy", seconds["surgery"] / seconds["copy"], "x", limit=1.5),
    ]
