"""One dense model and the texts that its variants are made and judged by: the same text, budget and judge for all.

Whatever makes up for lost units may be given to every method; what it is fitted on is the same text for all, and
SliceGPT's rotations, which are fitted too, have that text. Everything is judged by walking over the dense model's
layers: no checkpoint is written, but for ShortGPT's. Models that keep the same units are one, whatever chose them.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nirvana.allocation import Keep
from nirvana.architectures.architecture import Architecture
from nirvana.architectures.registry import describe
from nirvana.architectures.site import Site
from nirvana.calibration import calibration_digest
from nirvana.compensation import RIDGE, compensate
from nirvana.errors import InputError
from nirvana.head import head_divergence, token_losses
from nirvana.input_statistics import InputStatistics, input_statistics
from nirvana.methods.flap import bias_compensation
from nirvana.methods.registry import method_named
from nirvana.projections import output_projections
from nirvana.walk import Hidden, Stack, final_hidden_states
from nirvana.weights import model_digest
from studies.methods import FOLDER, Scores, cached_tensors, keep_of, scores_of
from studies.store import cached
from studies.variants import Compensation, Model, Variant, units_key, units_made

ROUND_TO = 8
BEST = ("fisher", "least_squares")
"""Method and compensation that the others are measured against, unless told otherwise."""

HiddenOf = Callable[[Int[Tensor, "windows tokens"]], Hidden]
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Text:
    """Token ids `[sequences, tokens]` and the digest that names them."""

    ids: Int[Tensor, "sequences tokens"]
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", calibration_digest(self.ids))


@dataclass(frozen=True)
class Texts:
    """What a comparison reads."""

    calibration: Text
    """Every method scores on it."""
    compensation: Text
    """Every compensation, and SliceGPT, is fitted on it."""
    heldout: Text
    """KL(dense‖pruned) is taken on it."""
    evaluation: Text
    """Windows whose losses are compared."""


def window_losses(stack: Stack, hidden: Hidden, ids: Int[Tensor, "windows tokens"]) -> Float[Tensor, " windows"]:
    """Return each window's mean negative log-likelihood of its tokens after the first, in nats."""
    targets = ids[:, 1:].flatten().to(hidden.device)
    losses = token_losses(hidden[:, :-1].flatten(0, 1), targets, stack.head_weight(), stack.architecture.logit_softcap)
    return losses.view(len(ids), -1).mean(dim=1)


class Comparison:
    """One dense model and the texts that it is pruned and judged by."""

    def __init__(self, model_directory: Path | str, texts: Texts, ridge: float = RIDGE, round_to: int = ROUND_TO):
        self.model_directory, self.texts = Path(model_directory), texts
        self.ridge, self.round_to = ridge, round_to
        self.model = model_digest(self.model_directory)
        self._updates: tuple[tuple[Any, ...], dict[str, Tensor]] | None = None

    @cached_property
    def stack(self) -> Stack:
        """The dense model, opened when the first row has to be computed."""
        stack = Stack.open(self.model_directory)
        if stack.architecture.is_encoder_decoder:
            raise InputError(
                f"expected a decoder-only model, got {stack.architecture.model_type}; what it is compared with is "
                "defined for those only"
            )
        return stack

    @cached_property
    def architecture(self) -> Architecture:
        """The dense model's, described without its weights."""
        return describe(self.model_directory)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Where its units live."""
        return tuple(self.architecture.sites())

    @cached_property
    def _dense_heldout(self) -> Hidden:
        return final_hidden_states(self.stack, self.texts.heldout.ids)

    @cached_property
    def _statistics(self) -> InputStatistics:
        """What the dense model's output projections read in the text for compensation, summed up."""

        def compute() -> dict[str, np.ndarray]:
            found = input_statistics(self.stack, self.texts.compensation.ids)
            kinds = {"mean": found.mean, "second_moment": found.second_moment}
            return {f"{kind} {name}": values.numpy() for kind, of in kinds.items() for name, values in of.items()}

        parts = {"kind": "input statistics", "model": self.model, "text": self.texts.compensation.digest}
        kept, _ = cached_tensors(parts, input_statistics, compute)
        by_kind: dict[str, dict[str, Tensor]] = {"mean": {}, "second_moment": {}}
        for name, values in kept.items():
            kind, parameter = name.split(" ", 1)
            by_kind[kind][parameter] = torch.from_numpy(values)
        return InputStatistics(**by_kind)

    # --- rows -------------------------------------------------------------------------------------------------

    def dense(self) -> Row:
        """Return the row of the model that is not pruned."""
        return self.row(Variant())

    def row(self, variant: Variant) -> Row:
        """Return one row, computed now unless it is known.

        Returns:
            `method`, `ratio`, `compensation`, `seed`; `achieved_ratio`; `modules`, for attention and mlp the share
            achieved, units, those kept, and weights, and `bytes`, where units leave; `parameters`, biases of the
            compensation included; `kl_divergence` on the held-out text, nats a token, and `divergences`, one mean a
            sequence of it; `losses`, one mean a window of the evaluation text; `saliency_seconds`,
            `compensation_seconds`, `evaluation_seconds` of the run that computed it.

        Raises:
            InputError: If the method is unknown, or cannot prune this model by this ratio.
        """
        variant.check(self)
        judged = cached(self._row_key(self.key(variant)), lambda: self._judge(variant.kind.made(self, variant)))
        names = {name: getattr(variant, name) for name in ("method", "ratio", "compensation", "seed")}
        return names | judged | variant.kind.seconds(self, variant)

    def judged_plan(self, keep: Keep) -> Row:
        """Return what a row says of kept units, whoever chose them; computed now unless it is known."""
        plain = Variant()
        return cached(self._row_key(units_key(self, keep, plain)), lambda: self._judge(units_made(self, keep, plain)))

    def _row_key(self, of: Mapping[str, Any]) -> dict[str, Any]:
        texts = {each: getattr(self.texts, each).digest for each in ("heldout", "evaluation")}
        return {"study": FOLDER, "kind": "row", "model": self.model, "texts": texts, "variant": dict(of)}

    def key(self, variant: Variant) -> dict[str, Any]:
        """Return what a variant of this model depends on."""
        return variant.kind.key(self, variant)

    def _judge(self, made: AbstractContextManager[Model]) -> Row:
        with made as model:
            return self.judged_by(model.hidden_of) | model.size

    def judged_by(self, hidden_of: HiddenOf) -> Row:
        """Return what is lost on the held-out and the evaluation text, by what the head would read."""
        start = time.monotonic()
        head, softcap = self.stack.head_weight(), self.stack.architecture.logit_softcap
        heldout, evaluation = self.texts.heldout.ids, self.texts.evaluation.ids
        pairs = zip(self._dense_heldout, hidden_of(heldout), strict=True)
        divergences = [head_divergence(dense, pruned, head, softcap) for dense, pruned in pairs]
        losses = window_losses(self.stack, hidden_of(evaluation), evaluation).tolist()
        if not np.isfinite([*divergences, *losses]).all():
            raise InputError("expected finite losses, got NaN or infinity; the model's activations overflow")
        return {
            "kl_divergence": float(np.mean(divergences)),
            "divergences": divergences,
            "losses": losses,
            "saliency_seconds": 0.0,
            "compensation_seconds": 0.0,
            "evaluation_seconds": time.monotonic() - start,
        }

    # --- what variants are made of ------------------------------------------------------------------------------

    def scores(self, variant: Variant) -> Scores:
        """Return a method's saliency on the calibration text, computed once for all studies."""
        text = self.texts.calibration
        return scores_of(
            method_named(variant.method), lambda: self.stack, self.model, text.ids, text.digest, variant.seed
        )

    def keep(self, variant: Variant) -> Keep:
        """Return which units a method keeps."""
        return keep_of(variant, self.sites, self.scores(variant).saliency, self.round_to)

    def updates(self, keep: Keep, compensation: Compensation) -> dict[str, Tensor]:
        """Return the parameters that a compensation changes or adds; the last model's are kept for what else asks."""
        if compensation == "none":
            return {}
        of = (
            compensation,
            self.texts.compensation.digest,
            *((name, tuple(kept.tolist())) for name, kept in keep.items()),
        )
        if self._updates is None or self._updates[0] != of:
            self._updates = None
            if compensation == "least_squares":
                found = dict(compensate(self.stack, keep, self.texts.compensation.ids, self.ridge))
            else:
                _check_can_have_biases(self.stack)
                found = dict(bias_compensation(self.stack, keep, self._statistics))
            self._updates = of, found
        return self._updates[1]


def _check_can_have_biases(stack: Stack) -> None:
    """A linear layer without a bias takes one for a call; what else there may be would ignore it."""
    for layer, projections in output_projections(stack.architecture).items():
        module = stack.architecture.layer_module(layer)
        for projection in projections:
            if not isinstance(module.get_submodule(projection.path_in(stack.architecture)), nn.Linear):
                raise InputError(
                    f"{projection.name}: expected a linear layer that can have a bias, got another kind; leave "
                    "compensation bias out"
                )
