"""Step: dense model + plan -> pruned checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from nirvana.plan import Plan
from nirvana.surgery import prune

if TYPE_CHECKING:
    from tasks.params import Params


def run(params: "Params", inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> None:
    """Write the checkpoint directory."""
    plan = Plan.read(inputs["plan"])
    with tqdm(desc="prune", unit="tensor") as bar:
        prune(inputs["model"], plan, outputs["checkpoint"], on_tensor=lambda name: bar.update())
