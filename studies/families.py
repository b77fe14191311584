"""Does the ranking of the methods hold in other families? One small transformer a family, trained on the same text.

The comparison prunes one pretrained model of one family. Here every family gets a model of the same sizes, trained on
the corpus of params.yaml, pruned by every method and judged as `studies.comparison` does it. What may differ
between families is what their attention and MLP are made of: biases, norms of queries and keys, windows, fused
matrices. Such a model is far from a pretrained one: what holds here is the order of the methods, not their losses.

A layer has four KV groups only. Methods by which every layer loses the same share round the groups down and make up
for it by neurons (`nirvana.allocation`, ranking `layers`): at ratio 0.2 they take no group.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nirvana.errors import InputError
from nirvana.files import read_json
from nirvana.methods.registry import method_named
from studies import tiny_model
from studies.comparison import BEST, Comparison, Row, Text, Texts
from studies.lines import Line, Rows
from studies.measure import row_or_reason
from studies.parts import run_parts
from studies.spec import Spec
from studies.store import STUDIES
from studies.subject import Subject
from studies.tiny_model import Recipe, check_families, read_text, trained_model
from studies.variants import DENSE, PUBLISHED_WITH, Variant
from tasks.workers.jobs import Job, Progress

CACHE = STUDIES / "families"
_CALIBRATION = 1
"""What tells the draw of the calibration text from that of the training text."""
Values = Mapping[str, Any]


def check(values: Values) -> None:
    """Refuse what cannot be.

    Raises:
        InputError: If a family or method is unknown, or the reference is not among the methods.
    """
    check_families(values["families"])
    for name in values["methods"]:
        method_named(name)
    if BEST[0] not in values["methods"]:
        raise InputError(
            f"methods: expected {BEST[0]} among them, which the others are measured against, "
            f"got {','.join(values['methods'])}; add it"
        )


def recipe_of(values: Values, family: str) -> Recipe:
    """Return how a family's model is trained."""
    return Recipe(**{each.name: values[each.name] for each in fields(Recipe) if each.name in values}, family=family)


def variants_of(values: Values, method: str, seed: int) -> list[Variant]:
    """Return a method as selected and with least squares, and with what its authors publish it with; at each ratio."""
    ways = dict.fromkeys(("none", *PUBLISHED_WITH.get(method, ()), "least_squares"))
    return [Variant(method, ratio, way, seed) for ratio in values["ratios"] for way in ways]  # type: ignore[arg-type]


def texts_of(text: tiny_model.Text, values: Values, seed: int) -> Texts:
    """Draw what a model is calibrated on, and cut what it is judged by: the same for all models.

    Raises:
        InputError: If the held-out text is too short.
    """
    length = values.get("length", Recipe.length)
    drawn = text.batch(np.random.default_rng((seed, _CALIBRATION)), values["compensation_sequences"], length)
    judged = text.spread(2 * values["windows"], length)
    return Texts(
        Text(drawn[: values["calibration_sequences"]].clone()),
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
def comparison_of(stated: str, family: str, seed: int, corpus: Path) -> Comparison:
    """Return a model and its texts, trained now unless it is there; `stated` are the values as JSON."""
    values = json.loads(stated)
    recipe = recipe_of(values, family)
    text = read_text(corpus, recipe.vocabulary, CACHE)
    digest = str(read_json(corpus / "source.json")["digest"])
    return Comparison(trained_model(text, recipe, seed, digest, CACHE), texts_of(text, values, seed))


def rows_of(values: Values, family: str, seed: int, corpus: Path, method: str) -> list[Row]:
    """Return a method's rows of one model, or the dense model's; each is remembered as the comparison's are."""
    comparison = comparison_of(json.dumps(dict(values), sort_keys=True), family, seed, corpus)
    names = {"family": family, "seed": seed}
    if method == DENSE:
        return [comparison.dense() | names]
    # whatever a family is refused for, for what the user asked for was checked
    return [row_or_reason(comparison, each, names, "") for each in variants_of(values, method, seed)]


def rows(subject: Subject, spec: Spec, values: Values) -> list[Row]:
    """Train, prune and judge; what an earlier run finished is not computed again.

    Returns:
        Rows of a comparison, with `family` and the model's `seed`; `unreachable` says why a method was refused.
    """
    check(values)
    corpus, processes = subject.corpus, subject.asked.processes
    text = read_text(corpus, recipe_of(values, values["families"][0]).vocabulary, CACHE)  # once, not in every process
    evaluation = texts_of(text, values, 0).evaluation  # a text too short is said before any training
    subject.parameters["corpus"] = read_json(corpus / "source.json")["digest"]
    shared = {"values": dict(values), "corpus": corpus}
    models = [
        shared | {"family": family, "seed": seed} for family in values["families"] for seed in range(values["seeds"])
    ]
    run_parts(do_part, [model | {"method": DENSE} for model in models], CACHE, "training", processes)
    parts = [model | {"method": method} for model in models for method in (DENSE, *values["methods"])]
    found = [row for each in run_parts(do_part, parts, CACHE, "pruning", processes) for row in each]
    dense = ", ".join(f"{row['family']} {np.mean(row['losses']):.3f}" for row in found if row["method"] == DENSE)
    unigram = unigram_loss(text, evaluation.ids, values["vocabulary"])
    subject.notes.append(f"dense loss, nats a token: {dense}; token frequencies alone: {unigram:.3f}")
    return found


def do_part(job: Job, device: str, progress: Progress) -> bytes:
    """Do one job of the study; return its rows as JSON."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading some megabytes
    return json.dumps(rows_of(**job.arguments)).encode()


def agreement(tables: Mapping[str, Sequence[Line]], _rows: Rows, values: Values) -> list[str]:
    """Say at each ratio how alike two families rank the methods."""
    return [_agreement(tables[""], ratio) for ratio in values["ratios"] if len(values["families"]) > 1]


def _agreement(lines: Sequence[Line], ratio: float) -> str:
    by_family: dict[str, dict[str, float]] = {}
    for line in lines:
        if line["ratio"] == ratio:
            by_family.setdefault(line["family"], {})[line["called"]] = line["loss"]
    shared = [way for way in next(iter(by_family.values())) if all(way in losses for losses in by_family.values())]
    if len(shared) < 2:
        return f"Ratio {ratio:g}: one row has no order to compare."
    ranks = {f: np.argsort(np.argsort([losses[way] for way in shared])) for f, losses in by_family.items()}
    alike = {pair: float(np.corrcoef([ranks[f] for f in pair])[0, 1]) for pair in combinations(ranks, 2)}
    least = min(alike, key=alike.__getitem__)
    return (
        f"Ratio {ratio:g}: rank correlation of two families' orders of {len(shared)} rows is "
        f"{np.mean(list(alike.values())):.2f} on average, {alike[least]:.2f} at least ({' and '.join(least)})."
    )
