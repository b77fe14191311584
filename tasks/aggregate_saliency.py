"""Step: what was collected -> unit saliency, one file a candidate."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file

from nirvana.architectures.registry import architecture_for, read_config
from nirvana.files import atomic_directory
from nirvana.methods.registry import METHODS
from nirvana.saliency import unit_saliency

if TYPE_CHECKING:
    from tasks.params import Params


def run(params: "Params", inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> None:
    """Write `candidate_NNN.safetensors` for each candidate: one vector a site; only channel sums have to be summed."""
    sites = architecture_for(read_config(inputs["model"])).sites()
    with atomic_directory(outputs["unit_saliency"]) as directory:
        for file in sorted(inputs["channel_saliency"].glob("candidate_*.safetensors")):
            collected = load_file(file)
            by_channel = METHODS[params.saliency.method].by_channel
            units = unit_saliency(sites, collected) if by_channel else collected
            save_file(units, directory / file.name)
