"""The pruning plan: which units of which model stay, as small JSON that a person can read, diff and replay."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from nirvana.allocation import Allocation, Keep, Ranking, Rule, Scope, achieved_ratio
from nirvana.architectures.site import Site
from nirvana.errors import InputError
from nirvana.fields import Fields, shortened
from nirvana.files import read_json, write_json
from nirvana.plan_names import check_told_once
from nirvana.ranges import from_ranges, to_ranges

SCHEMA_VERSION = 2
"""Version 1 had what the allocation was asked for among `parameters`, and the ratio once more beside them."""
PLAN_NAME = "nirvana_plan.json"
"""Name of the plan inside the checkpoint that it made."""
MODULES = ("attention", "mlp")

# What a file claims is not believed beyond any real model: indices are 8 bytes each once they are read.
_MOST_UNITS = 1_000_000  # of one site
_MOST_UNITS_IN_ALL = 50_000_000
_MOST_WEIGHTS = 1 << 40  # of one unit
_MOST_LAYERS = 1024  # of a model
_LARGEST_FACTOR = 1e9  # of gamma and attention_factor: with larger ones one module alone is pruned
_LARGEST_RIDGE = 1e9  # beyond it nothing is solved for that float32 could tell from what slicing leaves
_RATIO_SLACK = 1e-9  # ratios are exact but for the last digit; one neuron of the largest models is a share of 1e-7


@dataclass(frozen=True)
class PlannedSite:
    """What a plan says of one site."""

    name: str
    module: str
    layer: int
    units: int
    weights_per_unit: int
    keep_indices: NDArray[np.int64]


@dataclass(frozen=True)
class Compensation:
    """How what stays is solved for anew once the other units are gone."""

    ridge: float
    """Pull toward the columns as they were; see `nirvana.compensation.compensate`."""
    calibration_digest: str
    """Of the token ids it is fitted on, as `nirvana.calibration.calibration_digest` gives it."""


@dataclass(frozen=True)
class Plan:
    """Kept units of every site, with what they were derived from."""

    model_digest: str
    model_type: str
    num_layers: int
    calibration_digest: str
    allocation: Allocation | None
    """What the units were chosen by; None where a plan of version 1 does not spell it out."""
    achieved_ratio: Mapping[str, float]
    sites: tuple[PlannedSite, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else it came from; of version 1, the allocation too."""
    compensation: Compensation | None = None
    """None: the checkpoint holds what slicing leaves."""
    schema_version: int = SCHEMA_VERSION
    """A plan is written as it was read, so that a checkpoint built from it again keeps its bytes."""

    @classmethod
    def build(
        cls,
        sites: Sequence[Site],
        keep: Keep,
        *,
        model_digest: str,
        model_type: str,
        calibration_digest: str,
        allocation: Allocation,
        parameters: Mapping[str, Any] | None = None,
        compensation: Compensation | None = None,
    ) -> "Plan":
        """Make a plan of the kept units, the allocation that chose them, and the other settings that they came from."""
        kept_units = {name: len(indices) for name, indices in keep.items()}
        planned = tuple(
            PlannedSite(s.name, s.module, s.layer, s.units, s.weights_per_unit, keep[s.name]) for s in sites
        )
        return cls(
            model_digest=model_digest,
            model_type=model_type,
            num_layers=len({site.layer for site in sites}),
            calibration_digest=calibration_digest,
            allocation=allocation,
            achieved_ratio=achieved_ratio(sites, kept_units),
            sites=planned,
            parameters=dict(parameters or {}),
            compensation=compensation,
        )

    @property
    def requested_ratio(self) -> float:
        """Share of the block weights that was asked for."""
        return float(self.parameters["pruning_ratio"] if self.allocation is None else self.allocation.pruning_ratio)

    @property
    def other_parameters(self) -> dict[str, Any]:
        """What it came from beside the allocation."""
        told = () if self.allocation is None else [each.name for each in fields(Allocation)]
        return {key: value for key, value in self.parameters.items() if key not in told}

    @property
    def keep(self) -> Keep:
        """Kept indices by site name."""
        return {site.name: site.keep_indices for site in self.sites}

    def write(self, path: Path | str) -> None:
        """Write the plan as JSON, in the schema version that it has."""
        asked: dict[str, Any]
        if self.schema_version == 1:
            asked = {"requested_ratio": self.requested_ratio}
        else:
            asked = {"allocation": asdict(self.allocation) if self.allocation else None}
        write_json(
            path,
            {
                "schema_version": self.schema_version,
                "model": {
                    "digest": self.model_digest,
                    "model_type": self.model_type,
                    "num_layers": self.num_layers,
                },
                "calibration": {"digest": self.calibration_digest},
                "compensation": None if self.compensation is None else asdict(self.compensation),
                "parameters": dict(self.parameters),
                **asked,
                "achieved_ratio": dict(self.achieved_ratio),
                "sites": [
                    {
                        "name": site.name,
                        "module": site.module,
                        "layer": site.layer,
                        "units": site.units,
                        "weights_per_unit": site.weights_per_unit,
                        "keep": to_ranges(site.keep_indices),
                    }
                    for site in self.sites
                ],
            },
        )

    @classmethod
    def read(cls, path: Path | str) -> "Plan":
        """Read a plan, or the plan of a pruned checkpoint.

        The stated achieved ratio is held against the sites here, not in a separate check: no command and no caller
        then acts on a plan that was edited in one place only, or hands its wrong number on to a checkpoint.

        Args:
            path: The plan's file, or the directory of a pruned checkpoint.

        Raises:
            InputError: If the file is not a plan of this schema version, a value is missing, mistyped or out of range,
                the achieved ratio is not what the kept units come to, or what the plan says twice differs.
        """
        path = Path(path)
        if path.is_dir():
            path /= PLAN_NAME
            if not path.exists():
                raise InputError(
                    f"{path.parent}: expected a plan or a pruned checkpoint with {PLAN_NAME}, got a directory without "
                    "one; check the path"
                )
        value = read_json(path, unique_keys=True)
        version = value.get("schema_version") if isinstance(value, dict) else None
        if type(version) is not int or version not in (1, SCHEMA_VERSION):
            raise InputError(
                f"{path}: expected a plan of schema version 1 or {SCHEMA_VERSION}, got {shortened(version)}; "
                "make the plan again with this release"
            )
        try:
            plan = _read_plan(Fields(value, "", "make the plan again"), version)
            plan._check_counts()
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        return plan

    def _check_counts(self) -> None:
        ((name, times),) = Counter(site.name for site in self.sites).most_common(1)
        if times > 1:
            raise InputError(f"sites: expected each site once, got {name} {times} times; make the plan again")
        check_told_once(self.sites)
        layers = {site.layer for site in self.sites}
        if self.num_layers != len(layers):
            raise InputError(
                f"model.num_layers: expected {len(layers)}, the layers that the sites name, got {self.num_layers}; "
                "make the plan again"
            )
        counted = counted_ratio(self.sites)
        if any(abs(self.achieved_ratio[key] - share) > _RATIO_SLACK for key, share in counted.items()):
            raise InputError(
                f"achieved_ratio: expected {json.dumps(counted)}, which the kept units come to, got "
                f"{json.dumps(dict(self.achieved_ratio))}; write that if the plan was edited on purpose, else make it "
                "again"
            )

    def check_fits(self, sites: Sequence[Site], model_digest: str | None) -> None:
        """Refuse a model that the plan was not made for.

        Args:
            sites: The model's sites.
            model_digest: The model's digest, or None to compare shapes only.

        Raises:
            InputError: If the digest, or the name, place or size of any site differs, or sites that keep
                equally many units (the experts of a layer) do not.
        """
        expected = {site.name: (site.module, site.layer, site.units, site.weights_per_unit) for site in sites}
        planned = {site.name: (site.module, site.layer, site.units, site.weights_per_unit) for site in self.sites}
        if planned != expected or len(self.sites) != len(sites):
            odd = min((name for name, _ in set(planned.items()) ^ set(expected.items())), default="a site named twice")
            raise InputError(
                f"plan: expected a model with {_said(planned.get(odd))} at {odd}, "
                f"got one with {_said(expected.get(odd))}; the plan belongs to another model"
            )
        if model_digest is not None and model_digest != self.model_digest:
            raise InputError(
                f"plan: expected the model {self.model_digest[:23]}…, got {model_digest[:23]}…; "
                "apply the plan to the model it was made for, or make a new one"
            )
        self._check_equal_counts(sites)

    def check_type(self, model_type: str) -> None:
        """Refuse a model of another `model_type` than the plan says.

        Raises:
            InputError: If they differ.
        """
        if model_type != self.model_type:
            raise InputError(
                f"plan: expected a model of model_type {self.model_type!r} (model.model_type), got one of "
                f"{model_type!r}; make the plan again"
            )

    def _check_equal_counts(self, sites: Sequence[Site]) -> None:
        kept, first = {site.name: len(site.keep_indices) for site in self.sites}, dict[str, str]()
        for site in sites:
            if site.equal_with is None:
                continue
            other = first.setdefault(site.equal_with, site.name)
            if kept[other] != kept[site.name]:
                raise InputError(
                    f"plan: expected as many units at {site.name} as at {other} ({kept[other]}), which run as one "
                    f"tensor, got {kept[site.name]}; make the plan again"
                )

    def check_sizes(self, sites: Sequence[Site], checkpoint: Path | str) -> None:
        """Refuse a pruned checkpoint whose configuration has other sizes than the plan keeps.

        Args:
            sites: Of the pruned model.
            checkpoint: What errors call it.

        Raises:
            InputError: If the number of units at any site differs.
        """
        kept = {site.name: len(site.keep_indices) for site in self.sites}
        found = {site.name: site.units for site in sites}
        if kept != found:
            odd = min(name for name, _ in set(kept.items()) ^ set(found.items()))
            raise InputError(
                f"{checkpoint}: expected {kept.get(odd)} units at {odd} as its plan says, got {found.get(odd)}; "
                "plan and weights do not belong together: prune again"
            )


def _said(site: tuple[str, int, int, int] | None) -> str:
    if site is None:
        return "nothing"
    module, layer, units, weights = site
    return f"{units} units of {weights} weights ({module} of layer {layer})"


def _read_plan(top: Fields, version: int) -> Plan:
    model, achieved, parameters = top.inner("model"), top.inner("achieved_ratio"), top.free("parameters")
    if version == 1:
        _check_requested(top, parameters)
    return Plan(
        model_digest=model.text("digest"),
        model_type=model.text("model_type"),
        num_layers=model.whole("num_layers", 1, _MOST_UNITS),
        calibration_digest=top.inner("calibration").text("digest"),
        allocation=_spelt_out(parameters) if version == 1 else _read_allocation(top.inner("allocation")),
        achieved_ratio={key: achieved.share(key) for key in ("total", *MODULES)},
        sites=_read_sites(top.list_of("sites")),
        parameters=parameters,
        compensation=_read_compensation(top.inner_or_none("compensation")),
        schema_version=version,
    )


def _check_requested(top: Fields, parameters: Mapping[str, Any]) -> None:
    ratio, asked = top.share("requested_ratio"), parameters.get("pruning_ratio")
    if type(asked) not in (int, float) or asked != ratio:
        raise InputError(
            f"requested_ratio: expected parameters.pruning_ratio ({shortened(asked)}), got {ratio}; "
            "write the same in both, or make the plan again"
        )


def _spelt_out(parameters: Mapping[str, Any]) -> Allocation | None:
    """Return the allocation of a plan of version 1, whose parameters may hold anything or nothing."""
    optional = ("ranking", "attention_factor", "rule", "scope")
    said = {key: parameters[key] for key in optional if parameters.get(key) is not None}
    gamma = 1.0 if said.get("ranking") == "joint" else parameters.get("gamma")
    try:
        return Allocation(parameters["pruning_ratio"], gamma=gamma, round_to=parameters["round_to"], **said)  # type: ignore[arg-type]
    except (InputError, KeyError, TypeError, OverflowError):
        return None


def _read_allocation(value: Fields) -> Allocation:
    first, last = value.wholes("protected_layers", 2, _MOST_LAYERS)
    kinds = {"ranking": Ranking, "rule": Rule, "scope": Scope}
    said: dict[str, Any] = {name: value.choice(name, get_args(kind)) for name, kind in kinds.items()}
    said |= {name: value.above_zero(name, _LARGEST_FACTOR) for name in ("gamma", "attention_factor")}
    try:
        return Allocation(
            value.share("pruning_ratio"),
            round_to=value.whole("round_to", 1, _MOST_UNITS),
            protected_layers=(first, last),
            **said,
        )
    except InputError as error:  # alone each is right
        raise InputError(f"allocation: {error}") from None


def _read_compensation(value: Fields | None) -> Compensation | None:
    """Return what a plan says of compensation; plans of earlier releases say nothing."""
    if value is None:
        return None
    return Compensation(value.above_zero("ridge", _LARGEST_RIDGE), value.text("calibration_digest"))


def _read_sites(values: Sequence[Fields]) -> tuple[PlannedSite, ...]:
    units_left = _MOST_UNITS_IN_ALL
    for value in values:  # all of them before the first index is made
        units_left -= value.whole("units", 1, min(_MOST_UNITS, units_left))
    return tuple(_read_site(value) for value in values)


def _read_site(value: Fields) -> PlannedSite:
    units = value.whole("units", 1, _MOST_UNITS)
    try:
        keep_indices = from_ranges(value.raw("keep"), units)
    except InputError as error:
        raise InputError(f"{value.where}.{error}") from None
    return PlannedSite(
        name=value.text("name"),
        module=value.choice("module", MODULES),
        layer=value.whole("layer", 0, _MOST_UNITS),
        units=units,
        weights_per_unit=value.whole("weights_per_unit", 1, _MOST_WEIGHTS),
        keep_indices=keep_indices,
    )


def counted_ratio(sites: Iterable[PlannedSite]) -> dict[str, float]:
    """Return the share of block weights that leaves, counted from what a plan says: total, attention and mlp."""
    removed, whole = dict.fromkeys(("total", *MODULES), 0), dict.fromkeys(("total", *MODULES), 0)
    for site in sites:
        for key in ("total", site.module):
            removed[key] += (site.units - len(site.keep_indices)) * site.weights_per_unit
            whole[key] += site.units * site.weights_per_unit
    return {key: removed[key] / whole[key] if whole[key] else 0.0 for key in whole}
