"""What a pruning method is: how it scores units and how its scores share the budget, ours and the rivals' alike.

Whatever scores units does it with one signature, so that every method gets the same calibration ids, the same
budget and the same evaluation.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from jaxtyping import Float
from torch import Tensor

from nirvana.walk import Ids, Memory, Stack

Ranking = Literal["modules", "joint", "layers"]
"""Who competes with whom: KV groups with KV groups and neurons with neurons, the two rates `gamma` apart; all units of
the model in one list, by saliency a weight; or the units of one layer only, every layer losing the same share."""


@dataclass(frozen=True)
class Scoring:
    """What a scorer may need besides the model and the text."""

    microbatch: int = 2
    """Sequences a forward where gradients are wanted."""
    seed: int = 0
    """Of whatever is drawn: labels, random scores."""
    memory: Memory = "lean"
    """Whether activations are kept or recomputed; changes no result."""
    on_layer: Callable[[int], None] = field(default=lambda layer: None)
    """Called after each layer of each walk, for progress."""


class Scorer(Protocol):
    """Score every unit of a model on a calibration set."""

    def __call__(self, stack: Stack, ids: Ids, scoring: Scoring) -> dict[str, Float[Tensor, " units"]]:
        """Return one float32 vector a site, by site name, on the CPU; the least salient units leave first."""
        ...


@dataclass(frozen=True)
class Method:
    """A way to choose which units stay."""

    name: str
    scorer: Scorer
    ranking: Ranking
    gamma: float = 1.0
    """MLP rate / attention rate, for the rankings `modules` and `layers`."""
    protected: tuple[int, int] = (0, 0)
    """First and last layers that lose nothing."""
    source: str = ""
    """Paper and code that it follows."""
    attention_factor: float = 1.0
    """How many times a KV group's saliency counts, for the ranking `joint`."""
