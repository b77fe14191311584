"""What params.yaml asks of a model, held against its configuration and tokenizer before anything is computed."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nirvana.errors import InputError

if TYPE_CHECKING:
    from nirvana.architectures.architecture import Architecture
    from tasks.params import Params

_GIGABYTE = 1e9


def check_model(params: "Params", model: Path) -> "Architecture":
    """Check what the configuration of a model allows.

    Raises:
        InputError: If a length is beyond the model's context, the ratio cannot be reached, or its units cannot be
            scored or compensated as asked.
    """
    from nirvana.architectures.registry import describe

    architecture = describe(model)
    _check_lengths(params, architecture.config)
    _check_method(params, architecture)
    _check_ratio(params, architecture)
    return architecture


def context_tokens(config: Any) -> int | None:
    """Return how many tokens a model can read at once, at most; None where nothing limits it.

    Relative positions have no end, nor have rotary frequencies that adapt to the length. Where they are stretched, the
    configuration may name the length before or after: the longer reading counts.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(text, "max_position_embeddings", None)
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        return None
    longest = float(length)
    for rope in _ropes(text):
        kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
        if kind == "dynamic":
            return None
        if isinstance(factor, int | float) and factor > 1:
            longest = max(longest, length * factor)
    return int(longest)


def _ropes(config: Any) -> Iterator[dict[str, Any]]:
    """Yield what says how positions are rotated: one for the model, or one for each kind of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        said = getattr(config, name, None)
        if isinstance(said, dict):
            yield said
            yield from (inner for inner in said.values() if isinstance(inner, dict))


def _check_lengths(params: "Params", config: Any) -> None:
    context = context_tokens(config)
    if context is None:
        return
    asked = {
        "calibration.sequence_length": params.calibration.sequence_length,
        "calibration.heldout_length": params.calibration.heldout_length,
        "evaluation.window": params.evaluation.window,
        "benchmark.prompt_length": params.benchmark.prompt_length,
    }
    if params.compensation.method != "none":
        asked["compensation.sequence_length"] = params.compensation.sequence_length
    if params.recovery.tokens:
        asked["recovery.sequence_length"] = params.recovery.sequence_length
    for key, tokens in asked.items():
        if tokens > context:
            raise InputError(
                f"{key}: expected at most {context} tokens, which is this model's context "
                f"(max_position_embeddings), got {tokens}; lower it"
            )
    together = params.benchmark.prompt_length + params.benchmark.decode_tokens
    if together > context:
        raise InputError(
            f"benchmark.decode_tokens: expected at most {context - params.benchmark.prompt_length} after a prompt of "
            f"{params.benchmark.prompt_length}, as this model reads {context} tokens (max_position_embeddings), "
            f"got {params.benchmark.decode_tokens}; lower it or benchmark.prompt_length"
        )


def _check_method(params: "Params", architecture: "Architecture") -> None:
    """Some methods and compensation look at what enters a unit's output matrix: it has to be a module."""
    from nirvana.methods.registry import METHODS
    from nirvana.projections import output_projections

    asked = [
        f"{key} {value}"
        for key, value, looks in (
            ("saliency.method", params.saliency.method, METHODS[params.saliency.method].needs_projections),
            ("compensation.method", params.compensation.method, params.compensation.method != "none"),
        )
        if looks
    ]
    if not asked:
        return
    try:
        output_projections(architecture)
    except InputError as error:
        raise InputError(
            f"method.preset {params.method.preset}: expected a family whose output projections are modules for "
            f"{' and '.join(asked)}, got {architecture.model_type} ({str(error).partition(';')[0]}); set method.preset "
            "to nirvana, or saliency.method to nirvana, allocation.ranking to modules and compensation.method to none"
        ) from None


def _check_ratio(params: "Params", architecture: "Architecture") -> None:
    """Allocate on made-up saliency: whether a ratio can be reached depends on the units' sizes."""
    from tasks.unit_saliency import allocate_as_asked

    random = np.random.default_rng(0)
    saliency = {site.name: random.random(site.units, dtype=np.float32) for site in architecture.sites()}
    try:
        allocate_as_asked(architecture, saliency, params)
    except InputError as error:
        # which units leave first can decide whether sizes add up; what no order allows is certain
        if (
            "at most" in str(error)
            or "round_to" in str(error).partition(":")[0]
            or params.allocation.scope == "uniform"
        ):
            key = str(error) if str(error).startswith("allocation.") else f"allocation.{error}"
            raise InputError(key) from None


def shortages(params: "Params", model: Path) -> Iterator[str]:
    """Yield what this machine is too small for: warnings, for results may be there already, or come from elsewhere."""
    import shutil

    from nirvana.device import resolve_device, total_bytes
    from nirvana.estimate.steps import estimate
    from tasks.estimates.table import workload

    try:
        device = resolve_device(params.runtime.device)
    except InputError as error:
        yield str(error)
        return
    steps = estimate(model, workload(params), device, operations_per_second=1e12)
    there = total_bytes(device)
    least: dict[str, int] = {}
    for step in steps:
        least[step.step] = min(step.peak_bytes, least.get(step.step, step.peak_bytes))
    for name, needed in least.items():
        if needed > there:
            yield (
                f"{name} will need {needed / _GIGABYTE:.1f} GB of memory, this machine has {there / _GIGABYTE:.1f} GB; "
                "`nirvana estimate` shows which settings need less"
            )
    written = sum({step.step: step.disk_bytes for step in steps}.values())
    free = shutil.disk_usage(".").free
    if written > free:
        yield f"the steps will write {written / _GIGABYTE:.1f} GB, {free / _GIGABYTE:.1f} GB are free on this disk"
