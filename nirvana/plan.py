"""The pruning plan: which units of which model stay, as small JSON that a person can read, diff and replay."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana.allocation import Keep, achieved_ratio
from nirvana.architectures.site import Site
from nirvana.errors import InputError
from nirvana.files import read_json, write_json

SCHEMA_VERSION = 1
_MOST_UNITS = 10_000_000  # of one site: what a file claims is not believed beyond any real layer
_RANGES = re.compile(r"\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*\Z", re.ASCII)


def to_ranges(indices: Sequence[int] | NDArray[np.int64]) -> str:
    """Write sorted indices as ranges: `[0, 1, 2, 5]` becomes `"0-2,5"`."""
    values = np.asarray(indices, dtype=np.int64)
    runs = np.split(values, np.flatnonzero(np.diff(values) != 1) + 1)
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs if len(run))


def from_ranges(text: str, units: int) -> NDArray[np.int64]:
    """Read ranges back.

    Args:
        text: Ascending ranges such as `0-2,5`.
        units: Indices must be below this.

    Raises:
        InputError: If the text is no list of ranges, is empty, not strictly ascending or out of bounds.
    """
    if not isinstance(text, str) or not _RANGES.match(text):
        raise InputError(f"keep: expected ranges such as '0-2,5', got {str(text)[:60]!r}; make the plan again")
    bounds = [(int(first), int(last or first)) for first, _, last in (p.partition("-") for p in text.split(","))]
    previous = -1
    for first, last in bounds:
        if not previous < first <= last < units:
            raise InputError(
                f"keep: expected ascending indices below {units}, got {first}-{last} after {previous}; "
                "the plan belongs to another model or was edited"
            )
        previous = last
    return np.concatenate([np.arange(first, last + 1, dtype=np.int64) for first, last in bounds])


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
class Plan:
    """Kept units of every site, with what they were derived from."""

    model_digest: str
    model_type: str
    num_layers: int
    calibration_digest: str
    requested_ratio: float
    achieved_ratio: Mapping[str, float]
    sites: tuple[PlannedSite, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        sites: Sequence[Site],
        keep: Keep,
        *,
        model_digest: str,
        model_type: str,
        calibration_digest: str,
        parameters: Mapping[str, Any],
    ) -> "Plan":
        """Make a plan from an allocation; `parameters` are the settings it came from, `pruning_ratio` among them."""
        kept_units = {name: len(indices) for name, indices in keep.items()}
        planned = tuple(
            PlannedSite(s.name, s.module, s.layer, s.units, s.weights_per_unit, keep[s.name]) for s in sites
        )
        return cls(
            model_digest=model_digest,
            model_type=model_type,
            num_layers=len({site.layer for site in sites}),
            calibration_digest=calibration_digest,
            requested_ratio=float(parameters["pruning_ratio"]),
            achieved_ratio=achieved_ratio(sites, kept_units),
            sites=planned,
            parameters=dict(parameters),
        )

    @property
    def keep(self) -> Keep:
        """Kept indices by site name."""
        return {site.name: site.keep_indices for site in self.sites}

    def write(self, path: Path | str) -> None:
        """Write the plan as JSON."""
        write_json(
            path,
            {
                "schema_version": SCHEMA_VERSION,
                "model": {
                    "digest": self.model_digest,
                    "model_type": self.model_type,
                    "num_layers": self.num_layers,
                },
                "calibration": {"digest": self.calibration_digest},
                "parameters": dict(self.parameters),
                "requested_ratio": self.requested_ratio,
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
        """Read a plan.

        Raises:
            InputError: If the file is not a plan of this schema version, or its indices are out of range.
        """
        value = read_json(path)
        version = value.get("schema_version") if isinstance(value, dict) else None
        if version != SCHEMA_VERSION:
            raise InputError(
                f"{path}: expected a plan of schema version {SCHEMA_VERSION}, got {str(version)[:40]!r}; "
                "make the plan again with this release"
            )
        try:
            plan = cls(
                model_digest=str(value["model"]["digest"]),
                model_type=str(value["model"]["model_type"]),
                num_layers=int(value["model"]["num_layers"]),
                calibration_digest=str(value["calibration"]["digest"]),
                requested_ratio=float(value["requested_ratio"]),
                achieved_ratio={key: float(ratio) for key, ratio in value["achieved_ratio"].items()},
                sites=tuple(_read_site(site) for site in value["sites"]),
                parameters=dict(value["parameters"]),
            )
            if not np.isfinite([plan.requested_ratio, *plan.achieved_ratio.values()]).all():
                raise ValueError("a ratio is not finite")
            return plan
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(
                f"{path}: expected a whole plan, got one with a missing or mistyped part ({error!r:.80}); make it again"
            ) from error

    def check_fits(self, sites: Sequence[Site], model_digest: str | None) -> None:
        """Refuse a model that the plan was not made for.

        Args:
            sites: The model's sites.
            model_digest: The model's digest, or None to compare shapes only.

        Raises:
            InputError: If the digest, or the name or size of any site differs.
        """
        expected = {site.name: (site.units, site.weights_per_unit) for site in sites}
        planned = {site.name: (site.units, site.weights_per_unit) for site in self.sites}
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


def _said(size: tuple[int, int] | None) -> str:
    return "nothing" if size is None else f"{size[0]} units of {size[1]} weights"


def _read_site(value: Mapping[str, Any]) -> PlannedSite:
    units = int(value["units"])
    if not 1 <= units <= _MOST_UNITS:
        raise InputError(f"units: expected 1 to {_MOST_UNITS}, got {units}; make the plan again")
    return PlannedSite(
        name=str(value["name"]),
        module=str(value["module"]),
        layer=int(value["layer"]),
        units=units,
        weights_per_unit=int(value["weights_per_unit"]),
        keep_indices=from_ranges(value["keep"], units),
    )
