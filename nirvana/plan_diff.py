"""What two plans disagree on: settings, ratios, and unit by unit what stays."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana.allocation import Allocation
from nirvana.plan import MODULES, Compensation, Plan, PlannedSite
from nirvana.ranges import to_ranges


@dataclass(frozen=True)
class SiteDifference:
    """One site of two plans; a plan that lacks it keeps nothing there."""

    name: str
    a: PlannedSite | None
    b: PlannedSite | None
    kept_in_both: int
    only_in_a: NDArray[np.int64]
    only_in_b: NDArray[np.int64]

    @property
    def differs(self) -> bool:
        """Whether the plans disagree here."""
        return _shape(self.a) != _shape(self.b) or len(self.only_in_a) + len(self.only_in_b) > 0

    @property
    def module(self) -> str:
        """`attention` or `mlp`; A's word counts."""
        site = self.a or self.b
        return site.module if site else ""


@dataclass(frozen=True)
class PlanDifference:
    """What `diff_plans` found."""

    settings: Mapping[str, Mapping[str, Any]]
    """Settings that differ, e.g. `allocation.gamma`: the value in `a` and in `b`, left out where the plan has none."""
    achieved_ratio: Mapping[str, tuple[float, float]]
    """Total, attention and mlp, of A and of B, equal or not."""
    sites: tuple[SiteDifference, ...]
    """Every site of either plan, equal or not, in the order of A."""

    @property
    def equal(self) -> bool:
        """Whether the plans say the same."""
        return not self.settings and not self.differing_sites

    @property
    def differing_sites(self) -> tuple[SiteDifference, ...]:
        """The sites that the plans disagree on."""
        return tuple(site for site in self.sites if site.differs)

    def kept(self, module: str) -> tuple[int, int, int]:
        """Return the units of a module (or `total`) that both keep, that only A keeps and that only B keeps."""
        sites = [site for site in self.sites if module in ("total", site.module)]
        return (
            sum(site.kept_in_both for site in sites),
            sum(len(site.only_in_a) for site in sites),
            sum(len(site.only_in_b) for site in sites),
        )

    def overlap(self, module: str = "total") -> float:
        """Return the Jaccard overlap of the kept units: those that both keep ÷ those that either keeps; 1 if none."""
        both, *others = self.kept(module)
        return both / (both + sum(others)) if both + sum(others) else 1.0

    def as_json(self) -> dict[str, Any]:
        """Return the difference as plain values; of the sites, those that differ."""
        return {
            "equal": self.equal,
            "settings": {key: dict(values) for key, values in self.settings.items()},
            "achieved_ratio": {key: {"a": a, "b": b} for key, (a, b) in self.achieved_ratio.items()},
            "overlap": {module: self.overlap(module) for module in ("total", *MODULES)},
            "sites": [
                {
                    "name": site.name,
                    "module": site.module,
                    "units": {"a": site.a and site.a.units, "b": site.b and site.b.units},
                    "kept_in_both": site.kept_in_both,
                    "only_in_a": to_ranges(site.only_in_a),
                    "only_in_b": to_ranges(site.only_in_b),
                }
                for site in self.differing_sites
            ],
        }


def diff_plans(a: Plan, b: Plan) -> PlanDifference:
    """Compare two plans, of one model or of two; sites are matched by name."""
    in_a, in_b = ({site.name: site for site in plan.sites} for plan in (a, b))
    settings_a, settings_b = _settings(a), _settings(b)
    changed = {
        key: {side: values[key] for side, values in (("a", settings_a), ("b", settings_b)) if key in values}
        for key in [*settings_a, *(key for key in settings_b if key not in settings_a)]
        if _canonical(settings_a, key) != _canonical(settings_b, key)
    }
    return PlanDifference(
        settings=changed,
        achieved_ratio={key: (a.achieved_ratio[key], b.achieved_ratio[key]) for key in ("total", *MODULES)},
        sites=tuple(_diff_site(name, in_a.get(name), in_b.get(name)) for name in in_a | in_b),
    )


def _settings(plan: Plan) -> dict[str, Any]:
    return {
        "model.digest": plan.model_digest,
        "model.model_type": plan.model_type,
        "model.num_layers": plan.num_layers,
        "calibration.digest": plan.calibration_digest,
        **({} if plan.compensation is None else _of("compensation", plan.compensation)),
        **({} if plan.allocation is None else _of("allocation", plan.allocation)),
        **{f"parameters.{key}": value for key, value in sorted(plan.other_parameters.items())},
    }


def _of(section: str, values: Compensation | Allocation) -> dict[str, Any]:
    return {f"{section}.{key}": value for key, value in asdict(values).items()}


def _canonical(settings: Mapping[str, Any], key: str) -> str | None:
    """Return a value as text: for Python `true` equals 1, for a reader of the plan it does not."""
    return json.dumps(settings[key], sort_keys=True) if key in settings else None


def _diff_site(name: str, a: PlannedSite | None, b: PlannedSite | None) -> SiteDifference:
    nothing = np.empty(0, dtype=np.int64)
    kept_a, kept_b = (nothing if site is None else site.keep_indices for site in (a, b))
    return SiteDifference(
        name=name,
        a=a,
        b=b,
        kept_in_both=len(np.intersect1d(kept_a, kept_b, assume_unique=True)),
        only_in_a=np.setdiff1d(kept_a, kept_b, assume_unique=True),
        only_in_b=np.setdiff1d(kept_b, kept_a, assume_unique=True),
    )


def _shape(site: PlannedSite | None) -> tuple[str, int, int, int] | None:
    return None if site is None else (site.module, site.layer, site.units, site.weights_per_unit)
