"""Does the ranking of the methods hold in other families? One small transformer a family, trained on the same text.

The comparison prunes one pretrained model of one family. Here every family gets a model of the same sizes, trained on
the corpus of params.yaml, pruned by every method and judged as `studies.comparison` does it. What may differ
between families is what their attention and MLP are made of: biases, norms of queries and keys, windows, fused
matrices. Such a model is far from a pretrained one: what holds here is the order of the methods, not their losses.

A layer has four KV groups only. Methods by which every layer loses the same share round the groups down and make up
for it by neurons (`nirvana.baselines.same_share`): at ratio 0.2 they take no group.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nirvana.errors import InputError
from nirvana.files import read_json
from studies import tiny_model
from studies.comparison import BEST, DENSE, Comparison, Compensation, Text, Texts
from studies.methods import method_named
from studies.parts import run_parts
from studies.store import STUDIES
from studies.tiny_model import FAMILIES, Recipe, check_families, read_text, trained_model
from tasks.workers.jobs import Job, Progress

CACHE = STUDIES / "families"
REFUSED = "refused"
"""Key of a row that has nothing but names: why the method cannot prune this model so."""
RECIPE = Recipe(
    vocabulary=1024,
    hidden=128,
    layers=6,
    kv_groups=4,
    queries_per_kv=2,
    head_dim=16,
    neurons=384,
    steps=1000,
    learning_rate=4e-3,
    warmup=100,
)
"""About 1.3 million weights; three to four minutes on one core."""
_CALIBRATION = 1
"""What tells the draw of the calibration text from that of the training text."""

Rows = Sequence[Mapping[str, Any]]
Way = tuple[str, Compensation]
"""A method and what makes up for the units that it removes."""


@dataclass(frozen=True)
class Settings:
    """What is trained and which rows are asked for.

    Attributes:
        recipe: Of every model; its family is each of `families` in turn.
        families: Names in `studies.tiny_model.FAMILIES`.
        seeds: Models a family, each with first weights and calibration text of its own.
        methods: The method of `BEST` among them: the others are measured against it.
        ratios: Shares of the block weights that leave.
        calibration_sequences: Of training text, that every method scores on.
        compensation_sequences: That compensation is fitted on; the calibration sequences come first.
        windows: Of held-out text that losses are compared on, and as many others for the KL.
    """

    recipe: Recipe = RECIPE
    families: tuple[str, ...] = tuple(FAMILIES)
    seeds: int = 1
    methods: tuple[str, ...] = ("fisher", "nirvana", "flap", "llm_pruner", "wanda_sp", "magnitude")
    ratios: tuple[float, ...] = (0.2, 0.4)
    calibration_sequences: int = 32
    compensation_sequences: int = 160
    windows: int = 256

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            InputError: If a family or method is unknown, or the reference is not among the methods.
        """
        check_families(self.families)
        for name in self.methods:
            method_named(name)
        if BEST[0] not in self.methods:
            raise InputError(
                f"methods: expected {BEST[0]} among them, which the others are measured against, "
                f"got {','.join(self.methods)}; add it"
            )

    def models(self) -> list[tuple[str, int]]:
        """Return family and seed of every model."""
        return [(family, seed) for family in self.families for seed in range(self.seeds)]


QUICK = Settings(
    Recipe(steps=150), ("llama", "qwen2", "phi3"), methods=("fisher", "nirvana", "flap"), ratios=(0.4,), windows=64
)


def ways_of(method: str) -> tuple[Way, ...]:
    """Return a method as selected and with least squares; FLAP also with the bias that its authors publish."""
    bias: tuple[Way, ...] = ((method, "bias"),) if method == "flap" else ()
    return ((method, "none"), *bias, (method, "least_squares"))


# --- one model ------------------------------------------------------------------------------------------------


def texts_of(text: tiny_model.Text, settings: Settings, seed: int) -> Texts:
    """Draw what a model is calibrated on, and cut what it is judged by: the same for all models.

    Raises:
        InputError: If the held-out text is too short.
    """
    length = settings.recipe.length
    drawn = text.batch(np.random.default_rng((seed, _CALIBRATION)), settings.compensation_sequences, length)
    judged = text.spread(2 * settings.windows, length)
    return Texts(
        Text(drawn[: settings.calibration_sequences].clone()),
        Text(drawn),
        heldout=Text(judged[1::2].clone()),
        evaluation=Text(judged[::2].clone()),
    )


def unigram_loss(text: tiny_model.Text, ids: torch.Tensor, vocabulary: int) -> float:
    """Return the loss of a model that knows nothing but how often a token occurs, nats a token after a window's first.

    Args:
        text: Whose training text is counted, each token once more than it occurs.
        ids: Windows to judge.
        vocabulary: Tokens.
    """
    counts = torch.bincount(text.train.long(), minlength=vocabulary).double() + 1
    return float(-(counts / counts.sum()).log()[ids[:, 1:]].mean())


@functools.lru_cache(maxsize=1)
def comparison_of(settings: Settings, family: str, seed: int, corpus: Path) -> Comparison:
    """Return a model and its texts, trained now unless it is there."""
    recipe = replace(settings.recipe, family=family)
    text = read_text(corpus, recipe.vocabulary, CACHE)
    digest = str(read_json(corpus / "source.json")["digest"])
    return Comparison(trained_model(text, recipe, seed, digest, CACHE), texts_of(text, settings, seed))


def rows_of(settings: Settings, family: str, seed: int, corpus: Path, method: str) -> list[dict[str, Any]]:
    """Return a method's rows of one model, or the dense model's; each is remembered as the comparison's are."""
    comparison, names = comparison_of(settings, family, seed, corpus), {"family": family, "seed": seed}
    if method == DENSE:
        return [comparison.dense() | names]
    return [_row(comparison, way, ratio, names) for ratio in settings.ratios for way in ways_of(method)]


def _row(comparison: Comparison, way: Way, ratio: float, names: dict[str, Any]) -> dict[str, Any]:
    method, compensation = way
    try:
        return comparison.row(method, ratio, compensation, names["seed"]) | names
    except InputError as error:  # of this family: what the user asked for was checked
        return names | {"method": method, "ratio": ratio, "compensation": compensation, REFUSED: str(error)}


# --- all of them ----------------------------------------------------------------------------------------------


def measure(settings: Settings, corpus: Path, processes: int) -> dict[str, Any]:
    """Train, prune and judge; what an earlier run finished is not computed again.

    Args:
        settings: What is measured.
        corpus: What step fetch_corpus wrote.
        processes: Of one thread each.

    Returns:
        `rows`: of `Comparison.row`, with `family` and the model's `seed`; `unigram`: the loss of token frequencies
        on the same windows.
    """
    text = read_text(corpus, settings.recipe.vocabulary, CACHE)  # once, not in every process
    evaluation = texts_of(text, settings, 0).evaluation  # a text too short is said before any training
    shared = {"settings": settings, "corpus": corpus}
    models = [shared | {"family": family, "seed": seed} for family, seed in settings.models()]
    run_parts(do_part, [model | {"method": DENSE} for model in models], CACHE, "training", processes)
    parts = [model | {"method": method} for model in models for method in (DENSE, *settings.methods)]
    found = run_parts(do_part, parts, CACHE, "pruning", processes)
    unigram = unigram_loss(text, evaluation.ids, settings.recipe.vocabulary)
    return {"rows": [row for rows in found for row in rows], "unigram": unigram}


def do_part(job: Job, device: str, progress: Progress) -> bytes:
    """Do one job of the study; return its rows as JSON."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading some megabytes
    return json.dumps(rows_of(**job.arguments)).encode()
