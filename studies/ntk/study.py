"""How far pruning moves the kernel that governs training under Adam, and what fine-tuning makes of it afterwards.

Adam moves every weight by about its learning rate, as SignGD does: a step on x' changes f(x) by −lr · K(x, x'), with
K(x, x') = ⟨∂f(x)/∂W, sign ∂f(x')/∂W⟩. NIRVANA argues that K stays when the weights of least |W · ∂f/∂W| go. Here tiny
transformers, trained for the purpose, are pruned by NIRVANA's saliency, by magnitude and at random; K is measured
before and after, then all of them are fine-tuned alike.

K is not symmetric. It is taken over the block weights alone, which are all that pruning may remove. A pruned model is
its dense one with the condemned units set to zero: their gradients are zero too, so both have the same kernel.

Source: NIRVANA (arXiv 2509.14230), the SignGD kernel and its stability.
"""

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from nirvana.allocation import achieved_ratio, allocate
from nirvana.architectures.site import Site
from nirvana.files import read_json
from nirvana.loading import load_model
from nirvana.methods import Scorer, Scoring
from nirvana.saliency import channel_key, channel_saliency, unit_saliency
from nirvana.walk import Ids, Stack
from nirvana.weights import model_digest
from studies.store import STUDIES, cached
from studies.tiny_model import Recipe, Text, mean_loss, read_text, step, trained_model

CACHE = STUDIES / "ntk"

Sequences = Int[Tensor, "sequences tokens"]
Gradients = Float[Tensor, "sequences weights"]
Kernel = Float[Tensor, "sequences sequences"]


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        recipe: The model.
        seeds: Models, each with first weights, calibration text, random units and fine-tuning text of its own.
        ratios: Shares of the block weights that leave.
        gamma: MLP rate / attention rate, for every method; the paper's value for Llama-3.1-8B.
        kernel_sequences: Held-out sequences that the kernel is taken on; the same for all.
        calibration_sequences: Sequences that NIRVANA's saliency is computed on.
        loss_sequences: Held-out sequences that losses are measured on.
        finetuned_ratio: The ratio at which the pruned models are fine-tuned.
        finetuning_steps: AdamW steps.
        finetuning_rate: Their learning rate, constant.
        curve_every: Steps between two points of a fine-tuning curve.
    """

    recipe: Recipe = field(default_factory=Recipe)
    seeds: int = 6
    ratios: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    gamma: float = 3.36
    kernel_sequences: int = 32
    calibration_sequences: int = 32
    loss_sequences: int = 64
    finetuned_ratio: float = 0.4
    finetuning_steps: int = 160
    finetuning_rate: float = 1e-3
    curve_every: int = 10


QUICK = Settings(Recipe(steps=150), seeds=2, ratios=(0.2, 0.4, 0.6), kernel_sequences=16, finetuning_steps=40)


# --- who goes -------------------------------------------------------------------------------------------------


def nirvana_scores(stack: Stack, ids: Ids, scoring: Scoring) -> dict[str, Float[Tensor, " units"]]:
    """Score units by |W · ∂f/∂W|."""
    sums = channel_saliency(stack, ids, scoring.microbatch).sums
    return unit_saliency(stack.architecture.sites(), sums)


def magnitude_scores(stack: Stack, ids: Ids, scoring: Scoring) -> dict[str, Float[Tensor, " units"]]:
    """Score units by |W|; the text does not matter."""
    sites = stack.architecture.sites()
    slots = [slot for site in sites for slot in site.weight_slots]
    sums = {channel_key(slot): stack.parameter(slot.parameter).abs().sum(dim=1 - slot.dim) for slot in slots}
    return unit_saliency(sites, sums)


def random_scores(stack: Stack, ids: Ids, scoring: Scoring) -> dict[str, Float[Tensor, " units"]]:
    """Score units by chance."""
    generator = torch.Generator().manual_seed(scoring.seed)
    return {site.name: torch.rand(site.units, generator=generator) for site in stack.architecture.sites()}


METHODS: dict[str, Scorer] = {"nirvana": nirvana_scores, "magnitude": magnitude_scores, "random": random_scores}


@torch.no_grad()
def mask_units(model: Any, sites: Sequence[Site], keep: Mapping[str, NDArray[np.int64]]) -> None:
    """Set everything that the condemned units own to zero, in place."""
    for site in sites:
        condemned = np.setdiff1d(np.arange(site.units), keep[site.name])
        for slot in site.slots:
            owned = (slot.base + condemned[:, None] * slot.block + np.arange(slot.block)).ravel()
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
class Subject:
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
        scored = {method: scorer(self.stack, ids, Scoring(seed=self.seed)) for method, scorer in METHODS.items()}
        return {method: {name: each.numpy() for name, each in scores.items()} for method, scores in scored.items()}

    def pruned(self, method: str, ratio: float) -> tuple[Any, float]:
        """Return the masked model and the achieved ratio; `dense` prunes nothing."""
        model = copy.deepcopy(self.model)
        if method == "dense":
            return model, 0.0
        keep = allocate(self.sites, self.scores[method], ratio, self.settings.gamma, round_to=1)
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
def subject_of(settings: Settings, seed: int, corpus: Path) -> Subject:
    """Return a seed's model, trained now unless it is there."""
    text = read_text(corpus, settings.recipe.vocabulary, CACHE)
    return Subject(settings, seed, text, trained_model(text, settings.recipe, seed, corpus_digest(corpus), CACHE))


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


def _key(subject: Subject, corpus: Path) -> dict[str, Any]:
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
