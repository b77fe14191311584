"""Which rows of NIRVANA and its rivals the comparison asks for; `studies.comparison` computes them."""

from collections.abc import Iterator
from dataclasses import dataclass

from tqdm import tqdm

from nirvana.architectures.registry import describe
from nirvana.baselines.slicegpt_size import check_can_be_sliced
from studies.comparison import COMPENSATIONS, Comparison, Compensation, Row
from studies.methods import SEEDED, SHORTGPT, SLICEGPT, WITHOUT_UNITS, method_named


@dataclass(frozen=True)
class Settings:
    """Which rows are asked for; `seeds` counts for the methods that draw something."""

    methods: tuple[str, ...] = ("nirvana", "fisher", "flap", "llm_pruner", "wanda_sp", SHORTGPT, SLICEGPT)
    ratios: tuple[float, ...] = (0.2, 0.4)
    compensations: tuple[Compensation, ...] = COMPENSATIONS
    seeds: int = 1

    def cells(self) -> Iterator[tuple[str, float, Compensation, int]]:
        """Yield method, ratio, compensation and seed of every row."""
        for name in self.methods:
            seeds = self.seeds if name in SEEDED else 1
            # no unit of a projection leaves that the others could make up for
            compensations = COMPENSATIONS[:1] if name in WITHOUT_UNITS else self.compensations
            for seed in range(seeds):
                for ratio in self.ratios:
                    yield from ((name, ratio, compensation, seed) for compensation in compensations)


def measure(comparison: Comparison, settings: Settings) -> list[Row]:
    """Return the dense model's row and every row asked for; what an earlier run finished is not computed again.

    Raises:
        InputError: If a method is unknown, a ratio cannot be reached, or the model is of a kind that a method or
            compensation cannot work on.
    """
    for name in settings.methods:
        if name == SLICEGPT:
            check_can_be_sliced(describe(comparison.model_directory))
        elif name not in WITHOUT_UNITS:
            method_named(name)
    cells = list(settings.cells())
    rows = [comparison.dense()]
    with tqdm(cells, desc="comparing", unit="row") as bar:
        for name, ratio, compensation, seed in bar:
            bar.set_postfix_str(f"{name} {ratio:g} {compensation}")
            rows.append(comparison.row(name, ratio, compensation, seed))
    return rows
