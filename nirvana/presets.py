"""What a preset means, and what stands where a parameter is null: the preset's word, else the method's own.

Parameters are flat here, by dotted key as in params.yaml: `saliency.method`.
"""

from collections.abc import Mapping
from typing import Any

from nirvana.methods.registry import METHODS

PRESETS: dict[str, dict[str, Any]] = {
    "nirvana": {
        "calibration.averaged": 1,
        "saliency.method": "nirvana",
        "compensation.method": "none",
        "compensation.self_generated": 0,
    },
    "best": {
        "calibration.averaged": 6,
        "saliency.method": "fisher",
        "compensation.method": "least_squares",
        "compensation.self_generated": 96,
    },
}
COMPENSATION_SEQUENCES = 160
"""Sequences that least squares is fitted on unless something else is asked for."""


def resolve_presets(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters with those that are null as `method.preset` and then `saliency.method` say.

    What neither speaks of stays null; so does everything where the preset or the method is none that is known.
    """
    said = _of(PRESETS, values.get("method.preset"))
    if isinstance(pool_size := values.get("calibration.pool_size"), int) and "calibration.averaged" in said:
        said = {**said, "calibration.averaged": min(said["calibration.averaged"], pool_size)}
    filled = {key: said.get(key) if value is None else value for key, value in values.items()}
    method = _of(METHODS, filled.get("saliency.method"))
    own = {f"allocation.{name}": value for name, value in method.defaults.items()} if method else {}
    return {key: own.get(key) if value is None else value for key, value in filled.items()}


def _of(table: Mapping[str, Any], name: Any) -> Any:
    return table.get(name, {}) if isinstance(name, str) else {}
