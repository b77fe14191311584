"""What a pruning method is: how it scores units, and how its scores share the budget.

Whatever scores units does it with one signature, so that every method gets the same calibration ids, the same
budget and the same evaluation. Nothing here loads torch before something is scored.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from nirvana.allocation import Allocation, Ranking

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from nirvana.walk import Ids, Memory, Stack

Needs = Literal["nothing", "weights", "inputs", "input_gradients", "weight_gradients"]
"""What is computed to score: nothing; each layer's weights are read; a forward walk over the calibration text, to the
output projections' inputs; also a backward walk to their gradients; or to the gradients of the weights."""


@dataclass(frozen=True)
class Scoring:
    """What a scorer may need besides the model and the text."""

    microbatch: int = 2
    """Sequences a forward where gradients are wanted."""
    seed: int = 0
    """Seed of whatever is drawn: labels, random scores."""
    draws: int = 2
    """Label sequences drawn a calibration sequence, where labels are drawn."""
    memory: "Memory" = "lean"
    """Whether activations are kept or recomputed; changes no result."""
    on_layer: Callable[[int], None] = field(default=lambda layer: None)
    """Called after each layer of each walk, for progress."""


class Scorer(Protocol):
    """Score every unit of a model on a calibration set."""

    def __call__(self, stack: "Stack", ids: "Ids", scoring: Scoring) -> "dict[str, Float[Tensor, ' units']]":
        """Return one float32 vector a site, by site name, on the CPU; the least salient units leave first."""
        ...


@dataclass(frozen=True)
class Method:
    """A way to choose which units stay."""

    name: str
    source: str
    """Paper and code that it follows."""
    needs: Needs
    ranking: Ranking
    """How its scores share a budget, unless told otherwise; it and the next three are `Allocation`'s."""
    gamma: float = 1.0
    attention_factor: float = 1.0
    protected_layers: tuple[int, int] = (0, 0)
    per_weight: bool = False
    """Whether a unit's score is that of a weight, not that of all of its weights together: see `allocate`."""
    seeded: bool = False
    """Whether its scores depend on `Scoring.seed`."""
    by_channel: bool = False
    """Whether its scores are `nirvana.saliency.channel_saliency`, summed over the channels that a unit owns."""

    @property
    def scorer(self) -> Scorer:
        """The function of the method's name in the module of that name.

        Who remembers results has to know those modules by other means than its imports (`tasks.registry`, `studies`).
        """
        found: Scorer = getattr(importlib.import_module(f".{self.name}", __package__), self.name)
        return found

    @property
    def defaults(self) -> dict[str, Any]:
        """What its scores are allocated by, unless told otherwise, by the name of the `Allocation`'s field."""
        names = ("ranking", "gamma", "attention_factor", "protected_layers")
        return {name: getattr(self, name) for name in names}

    def allocation(self, pruning_ratio: float, **more: Any) -> Allocation:
        """Return what the method asks for at a ratio, with other fields of `Allocation` as given, e.g. `round_to=1`."""
        return Allocation(pruning_ratio, **{**self.defaults, **more})

    @property
    def reads_text(self) -> bool:
        """Whether its scores depend on the calibration text."""
        return self.needs not in ("nothing", "weights")

    @property
    def needs_projections(self) -> bool:
        """Whether units need an output projection that is a module of its own: fused experts have none."""
        return self.needs in ("inputs", "input_gradients")

    @property
    def walks(self) -> int:
        """How often it goes through all layers."""
        return {"nothing": 0, "weights": 1, "inputs": 1}.get(self.needs, 2)
