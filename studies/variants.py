"""What is judged: the dense model, or what a method makes of it.

A `Variant` names a model; its kind knows what its results depend on, which hidden states the head reads, how large it
is and how it is written. No study asks which method it is.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from nirvana.allocation import Keep, Rule, achieved_ratio
from nirvana.errors import InputError
from nirvana.files import scratch_directory
from nirvana.methods.registry import SHORTGPT, SLICEGPT, method_named
from nirvana.methods.shortgpt import write_shortgpt
from nirvana.methods.slicegpt import slicegpt, slicegpt_hidden_states
from nirvana.methods.slicegpt_size import check_can_be_sliced, dimension_for, sliced_size
from nirvana.plan import Compensation as PlannedCompensation
from nirvana.plan import Plan
from nirvana.ranges import to_ranges
from nirvana.slicing import Slicer
from nirvana.surgery import prune
from nirvana.walk import Hidden, Stack, TokenIds, final_hidden_states
from studies.biases import write_with_biases
from studies.methods import BOTH, SEEDED, allocation_of
from studies.rounding import PRECISIONS, STORED, quantised_hidden_states, stored_bytes
from studies.store import STUDIES

if TYPE_CHECKING:
    from studies.comparison import Comparison

DENSE = "dense"
Compensation = Literal["none", "bias", "least_squares"]
COMPENSATIONS: tuple[Compensation, ...] = ("none", "bias", "least_squares")
TITLES = {
    "nirvana": "NIRVANA",
    "fisher": "mask Fisher",
    "flap": "FLAP",
    "llm_pruner": "LLM-Pruner",
    "wanda_sp": "Wanda-sp",
    "shortgpt": "ShortGPT",
    "slicegpt": "SliceGPT",
    "lm_loss": "LM loss",
}
"""How methods are written for a reader, where it is not their name with spaces."""
PUBLISHED_WITH: dict[str, tuple[Compensation, ...]] = {"flap": ("bias",)}
"""The compensation that a method's authors publish it with."""
_SUFFIXES = {"none": "", "bias": " + bias", "least_squares": " + LS"}


class Model(NamedTuple):
    """A model as it is judged: what its head reads of token ids, and its size."""

    hidden_of: Callable[[TokenIds], Hidden]
    size: dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One model of a study: the dense one unless a method is named."""

    method: str = DENSE
    ratio: float = 0.0
    """Share of the block weights that leaves."""
    compensation: Compensation = "none"
    seed: int = 0
    """Of what the method draws, if anything."""
    gamma: float | None = None
    """MLP rate / attention rate; None: the method's own."""
    attention_factor: float | None = None
    """How often a KV group's saliency counts; None: the method's own."""
    round_to: int | None = None
    """Kept neurons of a layer are a multiple of this; None: the comparison's."""
    rule: Rule = "exact"
    """How ranking `modules` counts: `published` is the authors' code, which may miss the ratio."""
    where: str = BOTH
    """`mlp`, `attention` or both: where units may leave."""
    precision: str = STORED
    """How the block matrices that are left are stored; one of `studies.rounding.PRECISIONS`, or as they are."""

    @classmethod
    def of(cls, names: Mapping[str, Any]) -> "Variant":
        """Take the variant's fields of a row's names."""
        return cls(**{each.name: names[each.name] for each in fields(cls) if each.name in names})

    @property
    def kind(self) -> "Kind":
        """What kind of model it is."""
        return KINDS.get(self.method, _UNITS)

    @property
    def exists(self) -> bool:
        """Whether it is no other one: no compensation where no units leave, no seed where nothing is drawn."""
        return self.compensation in self.kind.compensations and (not self.seed or self.method in SEEDED)

    def check(self, comparison: "Comparison") -> None:
        """Refuse what cannot be, before anything is computed.

        Raises:
            InputError: If the method or the compensation is unknown, or the method cannot work on this model.
        """
        allowed = self.kind.compensations
        if self.compensation not in allowed:
            raise InputError(
                f"{self.method}: expected compensation {' or '.join(allowed)}, got {self.compensation}; choose one of "
                "them"
            )
        self.kind.check(comparison, self)


def titled(method: str) -> str:
    """Return how a method is written for a reader."""
    return TITLES.get(method, method.replace("_", " "))


def called(method: str, compensation: str = "none") -> str:
    """Return how a method with its compensation is written: `mask Fisher + LS` (least squares)."""
    return titled(method) + _SUFFIXES[compensation]


class Kind(Protocol):
    """How models of one kind are made."""

    compensations: Sequence[str]

    def check(self, on: "Comparison", variant: Variant) -> None:
        """Refuse what this kind cannot be."""

    def key(self, on: "Comparison", variant: Variant) -> dict[str, Any]:
        """Return what the model depends on besides the dense one."""

    def seconds(self, on: "Comparison", variant: Variant) -> dict[str, float]:
        """Return seconds that were spent before the model was made."""

    def made(self, on: "Comparison", variant: Variant) -> AbstractContextManager[Model]:
        """Yield the model."""
        ...

    def written(self, on: "Comparison", variant: Variant, directory: Path) -> tuple[Path, float]:
        """Return a checkpoint, maybe within `directory`, and the share of the block weights that left."""


class _Dense:
    compensations: Sequence[str] = ("none",)

    def check(self, on: "Comparison", variant: Variant) -> None:
        pass

    def key(self, on: "Comparison", variant: Variant) -> dict[str, Any]:
        return {"kind": DENSE, "precision": variant.precision}

    def seconds(self, on: "Comparison", variant: Variant) -> dict[str, float]:
        return {}

    @contextmanager
    def made(self, on: "Comparison", variant: Variant) -> Iterator[Model]:
        if variant.precision == STORED:
            yield Model(
                lambda ids: final_hidden_states(on.stack, ids), unit_sizes(on.stack, everything(on), {}, STORED)
            )
            return
        with units_made(on, everything(on), variant) as model:
            yield model

    def written(self, on: "Comparison", variant: Variant, directory: Path) -> tuple[Path, float]:
        return on.model_directory, 0.0


class _Units:
    """Units leave, and others may make up for them."""

    compensations: Sequence[str] = COMPENSATIONS

    def check(self, on: "Comparison", variant: Variant) -> None:
        method = method_named(variant.method)
        if variant.where != BOTH and (method.ranking == "layers" or any(method.protected_layers)):
            raise InputError(
                f"{variant.method}: expected a method that ranks the units of all layers together; leave it out"
            )

    def key(self, on: "Comparison", variant: Variant) -> dict[str, Any]:
        return units_key(on, on.keep(variant), variant)

    def seconds(self, on: "Comparison", variant: Variant) -> dict[str, float]:
        return {"saliency_seconds": on.scores(variant).seconds}

    @contextmanager
    def made(self, on: "Comparison", variant: Variant) -> Iterator[Model]:
        with units_made(on, on.keep(variant), variant) as model:
            yield model

    def written(self, on: "Comparison", variant: Variant, directory: Path) -> tuple[Path, float]:
        keep, target = on.keep(variant), directory / "checkpoint"
        biases = on.updates(keep, "bias") if variant.compensation == "bias" else {}
        planned, ids = None, None
        if variant.compensation == "least_squares":
            text = on.texts.compensation
            planned, ids = PlannedCompensation(on.ridge, text.digest), directory / "compensation.safetensors"
            save_file({"input_ids": text.ids.contiguous()}, ids)
        plan = Plan.build(
            on.sites,
            keep,
            model_digest=on.model,
            model_type=on.stack.architecture.model_type,
            calibration_digest=on.texts.calibration.digest,
            allocation=allocation_of(variant, on.round_to),
            parameters={"method": variant.method},
            compensation=planned,
        )
        pruned = directory / "pruned" if biases else target
        prune(on.model_directory, plan, pruned, calibration=ids)
        if biases:
            write_with_biases(pruned, biases, target)
        return target, plan.achieved_ratio["total"]


class _ShortGpt:
    """Whole layers leave."""

    compensations: Sequence[str] = ("none",)

    def check(self, on: "Comparison", variant: Variant) -> None:
        _refuse_changes(variant)

    def key(self, on: "Comparison", variant: Variant) -> dict[str, Any]:
        return {"kind": SHORTGPT, "ratio": variant.ratio, "calibration": on.texts.calibration.digest}

    def seconds(self, on: "Comparison", variant: Variant) -> dict[str, float]:
        return {}

    @contextmanager
    def made(self, on: "Comparison", variant: Variant) -> Iterator[Model]:
        with scratch_directory(STUDIES / SHORTGPT) as directory:
            start = time.monotonic()
            target, achieved = self.written(on, variant, directory)
            short = Stack.open(target)
            size = {"achieved_ratio": achieved, "parameters": _count(short.architecture.parameter_shapes)}
            yield Model(
                lambda ids: final_hidden_states(short, ids), size | {"saliency_seconds": time.monotonic() - start}
            )

    def written(self, on: "Comparison", variant: Variant, directory: Path) -> tuple[Path, float]:
        target = directory / "checkpoint"
        ids = on.texts.calibration.ids
        return target, write_shortgpt(on.model_directory, on.stack, ids, variant.ratio, target)


class _SliceGpt:
    """Directions of the residual stream leave; what counts as its size, the row's `size` says."""

    compensations: Sequence[str] = ("none",)

    def check(self, on: "Comparison", variant: Variant) -> None:
        _refuse_changes(variant)
        check_can_be_sliced(on.architecture)

    def key(self, on: "Comparison", variant: Variant) -> dict[str, Any]:
        return {"kind": SLICEGPT, "ratio": variant.ratio, "fitted_on": on.texts.compensation.digest}

    def seconds(self, on: "Comparison", variant: Variant) -> dict[str, float]:
        return {}

    @contextmanager
    def made(self, on: "Comparison", variant: Variant) -> Iterator[Model]:
        start, architecture = time.monotonic(), on.stack.architecture
        dimension = dimension_for(architecture, variant.ratio)
        model = slicegpt(on.stack, on.texts.compensation.ids, dimension)
        sized = sliced_size(architecture, dimension)
        size = {"achieved_ratio": sized.achieved_ratio, "parameters": sized.parameters, "size": sized.statement}
        yield Model(
            lambda ids: slicegpt_hidden_states(on.stack, model, ids),
            size | {"saliency_seconds": time.monotonic() - start},
        )

    def written(self, on: "Comparison", variant: Variant, directory: Path) -> tuple[Path, float]:
        raise InputError(f"expected a method that has a checkpoint, got {SLICEGPT}, which is only judged; leave it out")


KINDS: dict[str, Kind] = {DENSE: _Dense(), SHORTGPT: _ShortGpt(), SLICEGPT: _SliceGpt()}
_UNITS: Kind = _Units()


def _refuse_changes(variant: Variant) -> None:
    plain = Variant(variant.method, variant.ratio, variant.compensation, variant.seed)
    if replace(variant, round_to=None) != plain:
        raise InputError(f"expected methods that remove units, got {variant.method}, which removes none; leave it out")


def everything(on: "Comparison") -> Keep:
    """Return all units of a model."""
    return {site.name: np.arange(site.units, dtype=np.int64) for site in on.sites}


def units_key(on: "Comparison", keep: Keep, variant: Variant) -> dict[str, Any]:
    """Return what a model of these units depends on: they, and how the variant compensates and rounds."""
    ranges = {name: to_ranges(indices) for name, indices in keep.items()}
    digest = hashlib.sha256(json.dumps(ranges, sort_keys=True).encode()).hexdigest()
    key = {"kind": "units", "keep": digest, "compensation": variant.compensation, "precision": variant.precision}
    if variant.compensation != "none":
        key["fitted_on"] = on.texts.compensation.digest
    return key | ({"ridge": on.ridge} if variant.compensation == "least_squares" else {})


@contextmanager
def units_made(on: "Comparison", keep: Keep, variant: Variant) -> Iterator[Model]:
    """Yield the model of these units, compensated and rounded as the variant says."""
    stack, start = on.stack, time.monotonic()
    updates = on.updates(keep, variant.compensation)
    size = unit_sizes(stack, keep, updates, variant.precision) | {"compensation_seconds": time.monotonic() - start}
    if variant.precision == STORED:
        yield Model(lambda ids: final_hidden_states(stack, ids, keep, updates), size)
        return
    if variant.compensation == "bias":
        raise InputError("expected compensation none or least_squares beside a precision, got bias; leave one out")
    precision = PRECISIONS[variant.precision]
    yield Model(lambda ids: quantised_hidden_states(stack, keep, ids, updates, precision), size)


def unit_sizes(stack: Stack, keep: Keep, updates: Mapping[str, Tensor], precision: str) -> dict[str, Any]:
    """Return what is left where units left: shares by module, parameters and their bytes."""
    sites, shapes = stack.architecture.sites(), stack.architecture.parameter_shapes
    slicer = Slicer(sites, keep)
    left = {name: slicer.shape(name, shape) for name, shape in shapes.items()}
    extra = {name: tuple(value.shape) for name, value in updates.items() if name not in shapes}
    achieved = achieved_ratio(sites, {site: len(kept) for site, kept in keep.items()})
    modules = {}
    for module in ("attention", "mlp"):
        mine = [site for site in sites if site.module == module]
        modules[module] = {
            "achieved": achieved[module],
            "kept": sum(len(keep[site.name]) for site in mine),
            "units": sum(site.units for site in mine),
            "weights": sum(site.weights for site in mine),
        }
    return {
        "achieved_ratio": achieved["total"],
        "modules": modules,
        "parameters": _count(left | extra),
        "bytes": stored_bytes(stack, left, PRECISIONS.get(precision)),
    }


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(int(np.prod(shape)) for shape in shapes.values())
