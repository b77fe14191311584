"""FLAP: units whose contribution fluctuates little leave, and a bias stands in for their mean.

A column j of an output projection W scores var(x_j) · Σ_i W[i, j]² (the paper's WIFV), in attention the square of
that. Within each layer and module the columns are standardised: (score − mean) / standard deviation. A unit's score
is the mean over its columns. All units of the model, KV groups and neurons alike, then form one list (the code's
default structure, AL-AM). What leaves is replaced by its mean: `bias_compensation`.

Source: FLAP (arXiv 2312.11983), CASIA-IVA-Lab/FLAP, lib/prune.py and lib/layerwrapper.py at 9bbad71; that attention
is squared is in the code only.

Deviations: (1) The unit of attention is the KV group; the code knows no grouped queries (on such models its masks do
not fit). (2) The variance is that of all positions; the code's running one leaves out the first sequence and is taken
about a moving mean. (3) The list is cut where the weights removed meet the ratio, and every layer keeps a KV group and
a block of neurons; the code weighs a head as 512/3 neurons, LLaMA-7B's figure, and may empty a layer. (4) The
calibration text is what the caller gives; the code's default is 2,048 sequences of 128 tokens.
"""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from nirvana.input_statistics import InputStatistics, input_statistics
from nirvana.methods.method import Scoring
from nirvana.projections import OutputProjection, output_projections
from nirvana.walk import Ids, Stack


def flap(stack: Stack, ids: Ids, scoring: Scoring) -> dict[str, Float[Tensor, " units"]]:
    """Return FLAP's score of each unit, of one weight as it were: the standardised score itself is ranked."""
    return scores_from(stack, input_statistics(stack, ids, scoring.on_layer))


def scores_from(stack: Stack, statistics: InputStatistics) -> dict[str, Float[Tensor, " units"]]:
    """Return the scores that follow from the statistics of the output projections' inputs."""
    result = {}
    for projection in _projections(stack):
        site = projection.site
        columns = _standardised_columns(stack, projection, statistics)
        result[site.name] = columns.view(site.units, -1).mean(dim=1).float()
    return result


def _projections(stack: Stack) -> list[OutputProjection]:
    return [each for of_layer in output_projections(stack.architecture).values() for each in of_layer]


def _standardised_columns(
    stack: Stack, projection: OutputProjection, statistics: InputStatistics
) -> Float[Tensor, " columns"]:
    site, slot = projection.site, projection.slot
    score = stack.parameter(slot.parameter).double().square().sum(dim=0).cpu() * statistics.variance(slot.parameter)
    score = score[slot.span(site.units)]
    if site.module == "attention":
        score = score.square()
    spread = score.std()
    # all alike: none stands out
    return (score - score.mean()) / spread if spread > 0 else torch.zeros_like(score)


def bias_compensation(
    stack: Stack, keep: Mapping[str, NDArray[np.int64]], statistics: InputStatistics
) -> dict[str, Float[Tensor, " rows"]]:
    """Return the biases that stand in for the mean contribution of the units that leave.

    b = Σ_j E[x_j] · W[:, j] over the removed columns j, after the dense model's own bias where it has one.

    Args:
        keep: Kept units by site name.
        statistics: Of the dense model's inputs, on the calibration set.

    Returns:
        The whole bias, float32 on the stack's device, by the parameter's name, of each output projection that loses
        columns. Most families have no such parameter: the pruned layer then needs one.

    Source: FLAP (arXiv 2312.11983), baseline bias compensation.
    """
    result = {}
    for projection in _projections(stack):
        site, slot = projection.site, projection.slot
        removed = np.setdiff1d(np.arange(site.units), keep[site.name], assume_unique=True)
        if not len(removed):
            continue
        columns = torch.from_numpy(slot.indices(removed))
        weight = stack.parameter(slot.parameter)
        mean = statistics.mean[slot.parameter][columns].to(weight.device)
        bias = weight.index_select(1, columns.to(weight.device)).double() @ mean
        if projection.bias_name in stack.weights:
            bias = bias + stack.parameter(projection.bias_name)
        result[projection.bias_name] = bias.float()
    return result
