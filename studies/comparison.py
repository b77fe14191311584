"""NIRVANA and its rivals under one protocol: the same calibration text, budget and judge for all.

A row is one method at one ratio, its output projections as they were, with FLAP's bias, or solved for by least squares.
Whatever makes up for lost units may be given to every method; what it is fitted on is the same text for all, and
SliceGPT's rotations, which are fitted too, have that text.

Everything is judged by walking over the dense model's layers: no checkpoint is written, but for ShortGPT's. What counts
as SliceGPT's size, the row's `size` says.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nirvana.allocation import Keep, Rule, achieved_ratio
from nirvana.baselines.flap import bias_compensation
from nirvana.baselines.shortgpt import write_shortgpt
from nirvana.baselines.slicegpt import slicegpt, slicegpt_hidden_states
from nirvana.baselines.slicegpt_size import dimension_for, sliced_size
from nirvana.calibration import calibration_digest
from nirvana.compensation import RIDGE, compensate
from nirvana.errors import InputError
from nirvana.files import scratch_directory
from nirvana.head import head_divergence, token_losses
from nirvana.input_statistics import InputStatistics, input_statistics
from nirvana.methods import Method
from nirvana.projections import output_projections
from nirvana.slicing import Slicer
from nirvana.walk import Hidden, Stack, final_hidden_states
from nirvana.weights import model_digest
from studies.methods import (
    FOLDER,
    SEEDED,
    SHORTGPT,
    SLICEGPT,
    WITHOUT_UNITS,
    Scores,
    allocate_for,
    cached_tensors,
    method_named,
    scores_of,
)
from studies.store import STUDIES, cached

Compensation = Literal["none", "bias", "least_squares"]
COMPENSATIONS: tuple[Compensation, ...] = ("none", "bias", "least_squares")
DENSE = "dense"
ROUND_TO = 8
BEST = ("fisher", "least_squares")
"""What the others are measured against, unless told otherwise."""

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


def window_losses(
    hidden: Hidden, ids: Int[Tensor, "windows tokens"], head: Float[Tensor, "vocab hidden"], softcap: float | None
) -> Float[Tensor, " windows"]:
    """Return each window's mean negative log-likelihood of its tokens after the first, in nats."""
    targets = ids[:, 1:].flatten().to(hidden.device)
    return token_losses(hidden[:, :-1].flatten(0, 1), targets, head, softcap).view(len(ids), -1).mean(dim=1)


class Comparison:
    """One dense model and the texts that it is pruned and judged by."""

    def __init__(self, model_directory: Path | str, texts: Texts, ridge: float = RIDGE, round_to: int = ROUND_TO):
        self.model_directory, self.texts = Path(model_directory), texts
        self.ridge, self.round_to = ridge, round_to
        self.model = model_digest(self.model_directory)

    @cached_property
    def stack(self) -> Stack:
        """The dense model, opened when the first row has to be computed."""
        stack = Stack.open(self.model_directory)
        if stack.architecture.is_encoder_decoder:
            raise InputError(
                f"compare: expected a decoder-only model, got {stack.architecture.model_type}; its rivals are defined "
                "for those only"
            )
        return stack

    @cached_property
    def _dense_heldout(self) -> Hidden:
        return final_hidden_states(self.stack, self.texts.heldout.ids)

    @cached_property
    def _statistics(self) -> InputStatistics:
        """Of what the dense model's output projections read in the text for compensation."""

        def compute() -> dict[str, np.ndarray]:
            found = input_statistics(self.stack, self.texts.compensation.ids)
            kinds = {"mean": found.mean, "second_moment": found.second_moment}
            return {f"{kind} {name}": values.numpy() for kind, of in kinds.items() for name, values in of.items()}

        parts = {"kind": "input statistics", "model": self.model, "text": self.texts.compensation.digest}
        kept, _ = cached_tensors(parts, input_statistics, compute)
        by_kind = {
            kind: {
                name.removeprefix(f"{kind} "): torch.from_numpy(values)
                for name, values in kept.items()
                if name.startswith(f"{kind} ")
            }
            for kind in ("mean", "second_moment")
        }
        return InputStatistics(**by_kind)

    # --- rows -------------------------------------------------------------------------------------------------

    def dense(self) -> Row:
        """Return the row of the model that is not pruned."""
        return cached(self.key(DENSE, 0.0, "none", 0, {}), self._dense_row)

    def row(
        self,
        name: str | Method,
        ratio: float,
        compensation: Compensation = "none",
        seed: int = 0,
        rule: Rule = "exact",
        round_to: int | None = None,
    ) -> Row:
        """Return one row, computed now unless it is known.

        Args:
            name: One of `studies.methods.NAMES`, or a method that scores like one and ranks otherwise.
            ratio: Share of the block weights that leaves.
            compensation: What makes up for it.
            seed: Of what the method draws.
            rule: How ranking `modules` counts: `published` is the authors' code, which may miss the ratio.
            round_to: Kept neurons of a layer are a multiple of this; None: the comparison's.

        Returns:
            Names of what was asked for; `achieved_ratio`, and of `attention` and `mlp` by themselves in
            `achieved_by_module`; `parameters`, biases of the compensation included; `kl_divergence` on the held-out
            text, nats a token, and `divergences`, one mean a sequence of it; `losses`, one mean a window of the
            evaluation text; `saliency_seconds`, `compensation_seconds`, `evaluation_seconds` of the run that
            computed it.

        Raises:
            InputError: If the method is unknown, or cannot prune this model by this ratio.
        """
        if isinstance(name, str) and name in WITHOUT_UNITS:
            if compensation != "none":
                raise InputError(
                    f"{name}: expected compensation none, for no units leave that others could replace; got another"
                )
            compute = self._shortgpt_row if name == SHORTGPT else self._slicegpt_row
            return cached(self.key(name, ratio, "none", 0, {}), lambda: compute(ratio))
        method = _method(name)
        how = {key: value for key, value in asdict(method).items() if key not in ("scorer", "source")}
        how |= {"rule": rule, "round_to": round_to or self.round_to}
        key = self.key(method.name, ratio, compensation, seed if method.name in SEEDED else 0, how)
        return cached(key, lambda: self._pruned_row(method, ratio, compensation, seed, rule, round_to))

    def key(
        self, name: str, ratio: float, compensation: Compensation, seed: int, how: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return what a row depends on, for `studies.store.cached`."""
        texts = {each: getattr(self.texts, each).digest for each in ("calibration", "heldout", "evaluation")}
        if compensation != "none" or name == SLICEGPT:
            texts["compensation"] = self.texts.compensation.digest
        if name in (DENSE, SLICEGPT):
            del texts["calibration"]
        key: dict[str, Any] = {"study": FOLDER, "kind": "row", "model": self.model, "method": name, "how": dict(how)}
        key |= {"ratio": ratio, "compensation": compensation, "seed": seed, "texts": texts}
        return key | ({"ridge": self.ridge} if compensation == "least_squares" else {})

    def _dense_row(self) -> Row:
        shapes = self.stack.architecture.parameter_shapes
        size = {"achieved_ratio": 0.0, "parameters": _count(shapes.values())}
        return _named(DENSE, 0.0, "none", 0) | size | self.judged_by(lambda ids: final_hidden_states(self.stack, ids))

    def _shortgpt_row(self, ratio: float) -> Row:
        start = time.monotonic()
        with scratch_directory(STUDIES / FOLDER / SHORTGPT) as directory:
            target = directory / "checkpoint"
            achieved = write_shortgpt(self.model_directory, self.stack, self.texts.calibration.ids, ratio, target)
            short = Stack.open(target)
            size = {"achieved_ratio": achieved, "parameters": _count(short.architecture.parameter_shapes.values())}
            seconds = {"saliency_seconds": time.monotonic() - start}
            judged = self.judged_by(lambda ids: final_hidden_states(short, ids))
        return _named(SHORTGPT, ratio, "none", 0) | size | judged | seconds

    def _slicegpt_row(self, ratio: float) -> Row:
        start, architecture = time.monotonic(), self.stack.architecture
        dimension = dimension_for(architecture, ratio)
        model = slicegpt(self.stack, self.texts.compensation.ids, dimension)
        sized = sliced_size(architecture, dimension)
        size = {"achieved_ratio": sized.achieved_ratio, "parameters": sized.parameters, "size": sized.statement}
        seconds = {"saliency_seconds": time.monotonic() - start}
        judged = self.judged_by(lambda ids: slicegpt_hidden_states(self.stack, model, ids))
        return _named(SLICEGPT, ratio, "none", 0) | size | judged | seconds

    def _pruned_row(
        self, method: Method, ratio: float, compensation: Compensation, seed: int, rule: Rule, round_to: int | None
    ) -> Row:
        keep, seconds = self.keep(method, ratio, seed, rule, round_to)
        row = _named(method.name, ratio, compensation, seed) | self.judged(keep, compensation)
        return row | {"saliency_seconds": seconds}

    def judged(self, keep: Keep, compensation: Compensation = "none") -> Row:
        """Return what a row says of a pruned model, whoever chose its units; not remembered: who asks does that."""
        sites = self.stack.architecture.sites()
        start = time.monotonic()
        updates = self.updates(keep, compensation)
        solved = time.monotonic() - start
        slicer, shapes = Slicer(sites, keep), self.stack.architecture.parameter_shapes
        extra = [tuple(value.shape) for name, value in updates.items() if name not in shapes]
        achieved = achieved_ratio(sites, {site: len(kept) for site, kept in keep.items()})
        size = {
            "achieved_ratio": achieved.pop("total"),
            "achieved_by_module": achieved,
            "parameters": _count([*(slicer.shape(each, shape) for each, shape in shapes.items()), *extra]),
        }
        judged = self.judged_by(lambda ids: final_hidden_states(self.stack, ids, keep, updates))
        return size | judged | {"compensation_seconds": solved}

    def keep(
        self,
        name: str | Method,
        ratio: float,
        seed: int = 0,
        rule: Rule = "exact",
        round_to: int | None = None,
    ) -> tuple[Keep, float]:
        """Return which units a method keeps, and the seconds that its scores took."""
        method = _method(name)
        scores = self.scores(method, seed)
        sites = self.stack.architecture.sites()
        return allocate_for(method, sites, scores.saliency, ratio, round_to or self.round_to, rule), scores.seconds

    def scores(self, method: Method, seed: int = 0) -> Scores:
        """Return a method's saliency on the calibration text, computed once for all studies."""
        text = self.texts.calibration
        return scores_of(method, lambda: self.stack, self.model, text.ids, text.digest, seed)

    # --- what makes up for lost units, and what is left to lose --------------------------------------------------

    def updates(self, keep: Keep, compensation: Compensation) -> dict[str, Tensor]:
        """Return the parameters that a compensation changes or adds."""
        if compensation == "least_squares":
            return dict(compensate(self.stack, keep, self.texts.compensation.ids, self.ridge))
        if compensation == "bias":
            _check_can_have_biases(self.stack)
            return bias_compensation(self.stack, keep, self._statistics)
        return {}

    def judged_by(self, hidden_of: HiddenOf) -> Row:
        """Return what is lost on the held-out and the evaluation text, by what the head would read."""
        start = time.monotonic()
        head, softcap = self.stack.head_weight(), self.stack.architecture.logit_softcap
        heldout, evaluation = self.texts.heldout.ids, self.texts.evaluation.ids
        pairs = zip(self._dense_heldout, hidden_of(heldout), strict=True)
        divergences = [head_divergence(dense, pruned, head, softcap) for dense, pruned in pairs]
        losses = window_losses(hidden_of(evaluation), evaluation, head, softcap).tolist()
        if not np.isfinite([*divergences, *losses]).all():
            raise InputError("compare: expected finite losses, got NaN or infinity; the model's activations overflow")
        return {
            "kl_divergence": float(np.mean(divergences)),
            "divergences": divergences,
            "losses": losses,
            "saliency_seconds": 0.0,
            "compensation_seconds": 0.0,
            "evaluation_seconds": time.monotonic() - start,
        }


def _named(method: str, ratio: float, compensation: Compensation, seed: int) -> Row:
    return {"method": method, "ratio": ratio, "compensation": compensation, "seed": seed}


def _method(name: str | Method) -> Method:
    if isinstance(name, str):
        return method_named(name)
    if name.scorer is not method_named(name.name).scorer:  # what is remembered goes by the name
        raise ValueError(f"{name.name}: expected the scorer of that name")
    return name


def _count(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(int(np.prod(shape)) for shape in shapes)


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
