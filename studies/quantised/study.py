"""Pruned, then quantised: does one damage come on top of the other, or do they meet in the same weights?

A cell is one model, dense or pruned, at one precision. The order is that of practice: units leave, compensation solves
for what stays, and the matrices that are left are rounded, with scales of their own. Each layer is rounded as the walk
comes to it; no checkpoint is written. See `studies.quantised.weights` for what is simulated and what is not.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nirvana.allocation import Keep, achieved_ratio
from nirvana.architectures.site import Site
from nirvana.compensation import RIDGE, compensate
from nirvana.errors import InputError
from nirvana.slicing import Slicer
from nirvana.walk import FORWARD_TOKENS, Hidden, Stack, TokenIds, microbatches, part_of
from nirvana.weights import FLOAT_TYPES
from studies.comparison import BEST, DENSE, ROUND_TO, Comparison, Compensation, Row, Texts
from studies.methods import SHORTGPT, method_named
from studies.quantised.weights import PRECISIONS, STORED, Precision, quantised_bytes, round_trip
from studies.store import cached

STUDY = "quantised"
Model = tuple[str, float, Compensation]
"""Method, ratio, compensation."""


@dataclass(frozen=True)
class Settings:
    """Which cells are asked for."""

    ways: tuple[tuple[str, Compensation], ...] = (("nirvana", "none"), (BEST[0], "least_squares"))
    """Method and compensation."""
    ratios: tuple[float, ...] = (0.2, 0.4)
    precisions: tuple[str, ...] = (STORED, *PRECISIONS)

    def models(self) -> Iterator[Model]:
        """Yield the dense model, then every pruned one."""
        yield DENSE, 0.0, "none"
        yield from ((name, ratio, compensation) for name, compensation in self.ways for ratio in self.ratios)


def measure(study: "Quantised", settings: Settings) -> list[Row]:
    """Return a row a cell; what an earlier run finished is not computed again.

    Raises:
        InputError: If a method is unknown or a ratio cannot be reached.
    """
    for name, _ in settings.ways:
        if name == SHORTGPT:
            raise InputError(f"expected methods that remove units, got {SHORTGPT}, which removes layers; leave it out")
        method_named(name)
    cells = [(model, precision) for model in settings.models() for precision in settings.precisions]
    rows = []
    with tqdm(cells, desc="quantising", unit="cell") as bar:
        for (name, ratio, compensation), precision in bar:
            bar.set_postfix_str(f"{name} {ratio:g} {precision}")
            rows.append(study.cell(name, ratio, compensation, precision))
    return rows


class Quantised(Comparison):
    """One dense model and the texts that it is pruned and judged by, at several precisions."""

    def __init__(self, model_directory: Path | str, texts: Texts, ridge: float = RIDGE, round_to: int = ROUND_TO):
        super().__init__(model_directory, texts, ridge, round_to)
        self._made: tuple[Model, Keep, dict[str, Tensor]] | None = None

    def cell(self, name: str, ratio: float, compensation: Compensation, precision: str) -> Row:
        """Return one cell, computed now unless it is known.

        Args:
            name: A method of units, or `dense`.
            ratio: Share of the block weights that leaves.
            compensation: `none` or `least_squares`.
            precision: `stored` or one of `PRECISIONS`.

        Returns:
            Names of what was asked for; `achieved_ratio`; `parameters`; `bytes` of all parameters;
            `kl_divergence` on the held-out text, nats a token; `losses`, one mean a window of the evaluation text.
        """
        method = {} if name == DENSE else asdict(method_named(name))
        how = {key: value for key, value in method.items() if key not in ("scorer", "source")}
        how |= {"round_to": self.round_to, "precision": asdict(PRECISIONS[precision]) if precision != STORED else None}
        key = self.key(name, ratio, compensation, 0, how) | {"study": STUDY}
        return cached(key, lambda: self._cell(name, ratio, compensation, precision))

    def _cell(self, name: str, ratio: float, compensation: Compensation, precision: str) -> Row:
        keep, updates = self._pruned((name, ratio, compensation))
        rounding = PRECISIONS.get(precision)
        sites = self.stack.architecture.sites()
        judged = self.judged_by(lambda ids: quantised_hidden_states(self.stack, keep, ids, updates, rounding))
        slicer, shapes = Slicer(sites, keep), self.stack.architecture.parameter_shapes
        sizes = {each: slicer.shape(each, shape) for each, shape in shapes.items()}
        return {
            "method": name,
            "ratio": ratio,
            "compensation": compensation,
            "precision": precision,
            "achieved_ratio": achieved_ratio(sites, {site: len(kept) for site, kept in keep.items()})["total"],
            "parameters": sum(int(np.prod(shape)) for shape in sizes.values()),
            "bytes": stored_bytes(self.stack, sizes, rounding),
            "kl_divergence": judged["kl_divergence"],
            "losses": judged["losses"],
        }

    def _pruned(self, model: Model) -> tuple[Keep, dict[str, Tensor]]:
        """Return kept units and solved matrices; the last model's are kept, for its other precisions."""
        if self._made is None or self._made[0] != model:
            name, ratio, compensation = model
            sites, updates = self.stack.architecture.sites(), {}
            whole = {site.name: np.arange(site.units, dtype=np.int64) for site in sites}
            keep = whole if name == DENSE else self.keep(name, ratio)[0]
            if compensation == "least_squares":
                updates = dict(compensate(self.stack, keep, self.texts.compensation.ids, self.ridge))
            elif compensation != "none":
                raise InputError(f"expected compensation none or least_squares, got {compensation}; choose one of them")
            self._made = model, keep, updates
        return self._made[1], self._made[2]


@torch.no_grad()
def quantised_hidden_states(
    stack: Stack, keep: Keep, ids: TokenIds, updates: Mapping[str, Tensor], precision: Precision | None
) -> Hidden:
    """Return what the head reads where the block matrices that are left were rounded: a layer at a time.

    Args:
        stack: The dense model.
        keep: Kept units by site name.
        ids: Sequences.
        updates: What compensation solved for, by name.
        precision: None: as stored. Then this is `nirvana.walk.final_hidden_states`.
    """
    sites = stack.architecture.sites()
    slicer, matrices = Slicer(sites, keep), block_matrices(sites)
    kept_units = {name: len(indices) for name, indices in keep.items()}
    rows = microbatches(len(ids), max(1, FORWARD_TOKENS // ids.shape[1]))
    parts = [stack.embed(part_of(ids, each)) for each in rows]
    for layer, weights in stack.layers(range(stack.num_layers)):
        left = {name: updates[name] if name in updates else slicer.apply(name, weights[name]) for name in weights}
        if precision is not None:
            left |= {name: round_trip(left[name], precision) for name in left if name in matrices}
        fused = stack.architecture.fuse(layer, left)
        parts = [stack.run_layer(layer, part, fused, kept_units) for part in parts]
        del left, fused
    return torch.cat([stack.head_input(part, updates) for part in parts])


def block_matrices(sites: Sequence[Site]) -> frozenset[str]:
    """Return the names of the matrices that units own rows or columns of."""
    return frozenset(slot.parameter for site in sites for slot in site.weight_slots)


def stored_bytes(stack: Stack, shapes: Mapping[str, tuple[int, ...]], precision: Precision | None) -> int:
    """Return the bytes of all parameters: block matrices at a precision, whatever else as the checkpoint stores it.

    Args:
        stack: The dense model, whose types count.
        shapes: By parameter, after slicing.
        precision: None: block matrices as stored, too.
    """
    matrices = block_matrices(stack.architecture.sites())

    def size(name: str, shape: tuple[int, ...]) -> int:
        if precision is not None and name in matrices:
            return quantised_bytes(shape, precision)
        return int(np.prod(shape)) * FLOAT_TYPES[stack.weights.dtype(stack.stored_name(name))]

    return sum(size(name, shape) for name, shape in shapes.items())
