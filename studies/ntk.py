"""How far pruning moves the kernel that governs training under Adam, and what fine-tuning makes of it afterwards.

Adam moves every weight by about its learning rate, as SignGD does: a step on x' changes f(x) by −lr · K(x, x'), with
K(x, x') = ⟨∂f(x)/∂W, sign ∂f(x')/∂W⟩. NIRVANA argues that K stays when the weights of least |W · ∂f/∂W| go. Here tiny
transformers, trained for the purpose, are pruned by NIRVANA's saliency, by magnitude and at random; K is measured
before and after, then all of them are fine-tuned alike.

K is not symmetric. It is taken over the block weights alone, which are all that pruning may remove. A pruned model is
its dense one with the pruned units set to zero: their gradients are zero too, so both have the same kernel.

Source: NIRVANA (arXiv 2509.14230), the SignGD kernel and its stability.
"""

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from nirvana.allocation import Allocation, achieved_ratio, allocate
from nirvana.architectures.site import Site
from nirvana.files import read_json
from nirvana.loading import load_model
from nirvana.methods.method import Scoring
from nirvana.methods.registry import method_named
from nirvana.walk import Stack
from nirvana.weights import model_digest
from studies.lines import Line, Rows
from studies.parts import run_parts
from studies.spec import Spec
from studies.store import STUDIES, cached
from studies.subject import Subject
from studies.tiny_model import Recipe, Text, mean_loss, read_text, step, trained_model
from studies.variants import DENSE
from tasks.workers.jobs import Job, Progress

CACHE = STUDIES / "ntk"
METHODS = ("nirvana", "magnitude", "random")
"""Ours, then those that it is compared with."""
Sequences = Int[Tensor, "sequences tokens"]
Gradients = Float[Tensor, "sequences weights"]
Kernel = Float[Tensor, "sequences sequences"]


@dataclass(frozen=True)
class Settings:
    """What is measured; `studies/specs/ntk.yaml` says what each is."""

    recipe: Recipe
    seeds: int
    ratios: tuple[float, ...]
    gamma: float
    kernel_sequences: int
    calibration_sequences: int
    loss_sequences: int
    finetuned_ratio: float
    finetuning_steps: int
    finetuning_rate: float
    curve_every: int

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Settings":
        """Take a spec's values; `steps` are those of training."""
        own = {name: value for name, value in values.items() if name not in ("ratios", "steps")}
        return cls(Recipe(steps=values["steps"]), ratios=tuple(values["ratios"]), **own)


def rows(subject: Subject, spec: Spec, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Train, prune, measure and fine-tune; what an earlier run finished is not computed again."""
    return measured(Settings.of(values), subject.corpus, subject.asked.processes)


def measured(settings: Settings, corpus: Path, processes: int) -> list[dict[str, Any]]:
    """Return rows of `kind` kernel, one a seed, method and ratio, and curve, one a seed and method or the dense model.

    Args:
        settings: What is measured.
        corpus: What step fetch_corpus wrote.
        processes: Of one thread each.
    """
    read_text(corpus, settings.recipe.vocabulary, CACHE)  # once, not in every process
    models = [{"settings": settings, "corpus": corpus, "seed": seed} for seed in range(settings.seeds)]
    run_parts(do_part, [model | {"kind": "model", "method": ""} for model in models], CACHE, "training", processes)
    kinds = [("kernel", method) for method in METHODS] + [("curve", method) for method in (DENSE, *METHODS)]
    parts = [model | {"kind": kind, "method": method} for model in models for kind, method in kinds]
    values = run_parts(do_part, parts, CACHE, "pruning and fine-tuning", processes)
    return [{"kind": p["kind"], **row} for p, found in zip(parts, values, strict=True) for row in found]


def do_part(job: Job, device: str, progress: Progress) -> bytes:
    """Do one job of the study; return its rows as JSON."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading a megabyte
    names = ("settings", "seed", "corpus", "kind", "method")
    settings, seed, corpus, kind, method = (job.arguments[name] for name in names)
    found: list[dict[str, Any]] = []
    if kind == "model":
        subject_of(settings, seed, corpus)
    else:
        found = (
            kernel_rows(settings, seed, corpus, method) if kind == "kernel" else [curve(settings, seed, corpus, method)]
        )
    return json.dumps(found).encode()


@torch.no_grad()
def mask_units(model: Any, sites: Sequence[Site], keep: Mapping[str, NDArray[np.int64]]) -> None:
    """Set everything that the pruned units own to zero, in place."""
    for site in sites:
        pruned = np.setdiff1d(np.arange(site.units), keep[site.name])
        for slot in site.slots:
            owned = (slot.base + pruned[:, None] * slot.block + np.arange(slot.block)).ravel()
            model.get_parameter(slot.parameter).index_fill_(slot.dim, torch.from_numpy(owned), 0.0)


# --- the kernel -----------------------------------------------------------------------------------------------


def objective(model: Any, ids: Int[Tensor, "one tokens"]) -> Float[Tensor, ""]:
    """Return f of one sequence: the mean over the vocabulary of the largest logit at any position."""
    return model(input_ids=ids, use_cache=False).logits[0].max(dim=0).values.mean()


def block_gradients(model: Any, sites: Sequence[Site], ids: Sequences) -> Gradients:
    """Return ∂f/∂W of each sequence over all block weights, one row a sequence."""
    names = sorted({slot.parameter for site in sites for slot in site.weight_slots})
    weights = [model.get_parameter(name) for name in names]
    rows = [torch.autograd.grad(objective(model, ids[[index]]), weights) for index in range(len(ids))]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def signgd_kernel(gradients: Gradients) -> Kernel:
    """Return K[i, j] = ⟨∂f(x_i)/∂W, sign ∂f(x_j)/∂W⟩."""
    return gradients @ gradients.sign().T


def relative_change(pruned: Kernel, dense: Kernel) -> float:
    """Return ‖K_pruned − K_dense‖ / ‖K_dense‖, Frobenius norms."""
    return float(torch.linalg.norm(pruned - dense) / torch.linalg.norm(dense))


def alignment(pruned: Kernel, dense: Kernel) -> float:
    """Return the cosine between two kernels: what of the change is not mere size."""
    return float((pruned * dense).sum() / (torch.linalg.norm(pruned) * torch.linalg.norm(dense)))


# --- one seed -------------------------------------------------------------------------------------------------


@dataclass
class Trained:
    """One trained model and everything that is measured on it."""

    settings: Settings
    seed: int
    text: Text
    directory: Path

    def __post_init__(self) -> None:
        recipe = self.settings.recipe
        self.stack = Stack.open(self.directory)
        self.sites = self.stack.architecture.sites()
        self.model = load_model(self.directory)
        self.kernel_ids = self.text.spread(self.settings.kernel_sequences, recipe.length)
        self.loss_ids = self.text.spread(self.settings.loss_sequences, recipe.length)

    def generator(self, purpose: int) -> np.random.Generator:
        """Return this seed's own chance for one purpose."""
        return np.random.default_rng((self.seed, purpose))

    @functools.cached_property
    def dense_kernel(self) -> Kernel:
        """The kernel before pruning."""
        return signgd_kernel(block_gradients(self.model, self.sites, self.kernel_ids))

    @functools.cached_property
    def scores(self) -> dict[str, dict[str, NDArray[np.float32]]]:
        """Unit scores by method and site."""
        ids = self.text.batch(self.generator(1), self.settings.calibration_sequences, self.settings.recipe.length)
        scoring = Scoring(seed=self.seed)
        scored = {name: method_named(name).scorer(self.stack, ids, scoring) for name in METHODS}
        return {method: {name: each.numpy() for name, each in scores.items()} for method, scores in scored.items()}

    def pruned(self, method: str, ratio: float) -> tuple[Any, float]:
        """Return the masked model and the achieved ratio; `dense` prunes nothing."""
        model = copy.deepcopy(self.model)
        if method == DENSE:
            return model, 0.0
        keep = allocate(self.sites, self.scores[method], Allocation(ratio, gamma=self.settings.gamma, round_to=1))
        mask_units(model, self.sites, keep)
        return model, achieved_ratio(self.sites, {name: len(kept) for name, kept in keep.items()})["total"]

    def kernel_row(self, method: str, ratio: float) -> dict[str, Any]:
        """Prune, and compare kernels and losses."""
        model, achieved = self.pruned(method, ratio)
        kernel = signgd_kernel(block_gradients(model, self.sites, self.kernel_ids))
        return {
            "seed": self.seed,
            "method": method,
            "ratio": ratio,
            "achieved_ratio": achieved,
            "relative_change": relative_change(kernel, self.dense_kernel),
            "alignment": alignment(kernel, self.dense_kernel),
            "loss": mean_loss(model, self.loss_ids),
            "dense_loss": mean_loss(self.model, self.loss_ids),
        }

    def curve(self, method: str) -> dict[str, Any]:
        """Prune, fine-tune all weights with AdamW; return the held-out loss at some of the steps, the first at 0."""
        settings, recipe = self.settings, self.settings.recipe
        model, _ = self.pruned(method, settings.finetuned_ratio)
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.finetuning_rate, weight_decay=0.0)
        generator = self.generator(2)  # the same text for every method
        steps, losses = [0], [mean_loss(model, self.loss_ids)]
        for number in range(1, settings.finetuning_steps + 1):
            step(model, self.text.batch(generator, recipe.batch, recipe.length), optimizer)
            if number % settings.curve_every == 0:
                steps.append(number)
                losses.append(mean_loss(model, self.loss_ids))
        return {"seed": self.seed, "method": method, "steps": steps, "losses": losses}


# --- parts ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def subject_of(settings: Settings, seed: int, corpus: Path) -> Trained:
    """Return a seed's model, trained now unless it is there."""
    text = read_text(corpus, settings.recipe.vocabulary, CACHE)
    return Trained(settings, seed, text, trained_model(text, settings.recipe, seed, corpus_digest(corpus), CACHE))


def corpus_digest(corpus: Path) -> str:
    """Return the digest of the documents that step fetch_corpus wrote."""
    return str(read_json(corpus / "source.json")["digest"])


def kernel_rows(settings: Settings, seed: int, corpus: Path, method: str) -> list[dict[str, Any]]:
    """Return one row a ratio: how far this method moves the kernel; each is kept as soon as it is there."""
    subject = subject_of(settings, seed, corpus)
    parts = _key(subject, corpus) | {"part": "kernel", "method": method, "sequences": settings.kernel_sequences}

    def row(ratio: float) -> dict[str, Any]:
        return cached(parts | {"ratio": ratio}, lambda: subject.kernel_row(method, ratio))

    return [row(ratio) for ratio in settings.ratios]


def curve(settings: Settings, seed: int, corpus: Path, method: str) -> dict[str, Any]:
    """Return the fine-tuning curve of this method, kept."""
    subject = subject_of(settings, seed, corpus)
    tuning = {name: value for name, value in asdict(settings).items() if name.startswith("finetun")}
    parts = _key(subject, corpus) | {"part": "curve", "method": method, "every": settings.curve_every, **tuning}
    return cached(parts, lambda: subject.curve(method))


def _key(subject: Trained, corpus: Path) -> dict[str, Any]:
    """Return what both kinds of parts depend on."""
    settings = subject.settings
    return {
        "study": "ntk",
        "model": model_digest(subject.directory),
        "corpus": corpus_digest(corpus),
        "seed": subject.seed,
        "gamma": settings.gamma,
        "calibration_sequences": settings.calibration_sequences,
        "loss_sequences": settings.loss_sequences,
        "vocabulary": settings.recipe.vocabulary,
        "length": settings.recipe.length,
        "batch": settings.recipe.batch,
    }


# --- what came out --------------------------------------------------------------------------------------------


def of_kind(rows: Rows, kind: str) -> list[Mapping[str, Any]]:
    """Return the rows of a kind, `kernel` or `curve`."""
    return [row for row in rows if row["kind"] == kind]


def points(rows: Rows, _values: Mapping[str, Any]) -> list[Line]:
    """Return a line a point of a fine-tuning curve; `above_dense` is the loss above the dense model's of that seed."""
    curves = of_kind(rows, "curve")
    dense = {row["seed"]: row["losses"] for row in curves if row["method"] == DENSE}
    return [
        {"seed": row["seed"], "method": row["method"], "step": step, "loss": loss, "above_dense": loss - of}
        for row in curves
        for step, loss, of in zip(row["steps"], row["losses"], dense[row["seed"]], strict=True)
    ]


def kernels(rows: Rows, _values: Mapping[str, Any]) -> list[Line]:
    """Return a line a seed, method and ratio."""
    return [dict(row) for row in of_kind(rows, "kernel")]


def kernel_means(rows: Rows, values: Mapping[str, Any]) -> list[Line]:
    """Return a line a method and ratio: means over seeds, and the deviation between them."""
    return means(kernels(rows, values), ("method", "ratio"), ("relative_change", "alignment", "loss"))


def curve_means(rows: Rows, values: Mapping[str, Any]) -> list[Line]:
    """Return a line a method and step: means over seeds, and the deviation between them."""
    return means(points(rows, values), ("method", "step"), ("loss", "above_dense"))


def means(lines: Rows, names: Sequence[str], columns: Sequence[str]) -> list[Line]:
    """Return the mean of columns over lines of the same names; `{column}_deviation` is that of a sample."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for line in lines:
        groups.setdefault(tuple(line[name] for name in names), []).append(line)
    found = []
    for key, members in groups.items():
        line = dict(zip(names, key, strict=True)) | {"models": len(members)}
        for column in columns:
            values = np.array([member[column] for member in members], dtype=np.float64)
            line[column] = float(values.mean())
            line[f"{column}_deviation"] = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        found.append(line)
    return found


def verdict(_tables: Mapping[str, Sequence[Line]], rows: Rows, _values: Mapping[str, Any]) -> list[str]:
    """Say in how many models, compared within a seed, NIRVANA moves the kernel less and learns better than others."""
    found = {}
    for column, sign in (("relative_change", 1), ("alignment", -1)):
        # ratios of one model are no further evidence: they count as one
        of = means(of_kind(rows, "kernel"), ("method", "seed"), (column,))
        found[column] = _wins({(line["method"], line["seed"]): sign * line[column] for line in of})
    curves = of_kind(rows, "curve")
    ends = _wins({(row["method"], row["seed"]): row["losses"][-1] for row in curves})
    seeds, last = len({row["seed"] for row in rows}), curves[0]["steps"][-1]
    return [
        f"Kernel: of {seeds} models NIRVANA moved it less than {_counts(found['relative_change'])}; turned it less "
        f"(cosine) than {_counts(found['alignment'])}; the claim {_held(found['relative_change'], seeds)}.",
        f"Fine-tuning: of {seeds} models NIRVANA's ended better after {last} steps than {_counts(ends)}; the claim "
        f"{_held(ends, seeds)}.",
    ]


def _wins(values: Mapping[tuple[str, int], float]) -> dict[str, int]:
    """Return by method in how many seeds ours has less."""
    ours, *others = METHODS
    seeds = {seed for _, seed in values}
    return {other: sum(values[ours, seed] < values[other, seed] for seed in seeds) for other in others}


def _held(wins: Mapping[str, int], of: int) -> str:
    if all(count == of for count in wins.values()):
        return "held, without exception"
    return "held on the whole" if all(2 * count > of for count in wins.values()) else "did not hold"


def _counts(wins: Mapping[str, int]) -> str:
    return " and ".join(f"{other} in {count}" for other, count in wins.items())
