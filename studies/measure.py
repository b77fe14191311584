"""The usual measure of a study: every variant judged on the same text, a row each."""

from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from nirvana.errors import InputError
from nirvana.methods.registry import NAMES
from studies.comparison import Comparison, Row
from studies.spec import Spec
from studies.subject import Subject
from studies.variants import Variant

UNREACHABLE = "unreachable"
"""Key of a row that has nothing but names: why there is nothing to judge."""


def variants_of(spec: Spec, values: Mapping[str, Any]) -> list[tuple[Variant, dict[str, Any]]]:
    """Return the variants of a study and their names; `all` among methods stands for all, and none is named twice."""
    if values.get("methods") == ["all"]:
        values = {**values, "methods": list(NAMES)}
    found = [(Variant.of(names), names) for names in spec.names(values)]
    explicit = any("way" in each.get("each", {}) for each in spec.variants)
    return [(variant, names) for variant, names in found if explicit or variant.method not in NAMES or variant.exists]


def check(comparison: Comparison, variants: Sequence[tuple[Variant, Any]]) -> None:
    """Refuse what cannot be judged before anything is computed."""
    for variant, _ in variants:
        variant.check(comparison)


def rows(subject: Subject, spec: Spec, values: Mapping[str, Any]) -> list[Row]:
    """Return a row a variant; what an earlier run finished is not computed again.

    Raises:
        InputError: If a method is unknown or cannot work on this model, or a ratio cannot be reached and the spec does
            not expect that.
    """
    comparison, variants = subject.comparison, variants_of(spec, values)
    check(comparison, variants)
    found = []
    with tqdm(variants, desc=spec.name, unit="row") as bar:
        for variant, names in bar:
            bar.set_postfix_str(" ".join(str(value) for value in names.values()))
            found.append(row_or_reason(comparison, variant, names, spec.unreachable))
    return found


def row_or_reason(comparison: Comparison, variant: Variant, names: Mapping[str, Any], unreachable: str | None) -> Row:
    """Return a variant's row under its names; one with `UNREACHABLE` where an expected error says why not."""
    try:
        return {**comparison.row(variant), **names}
    except InputError as error:
        if unreachable is None or unreachable not in str(error):
            raise
        ours = {"method": variant.method, "ratio": variant.ratio, "compensation": variant.compensation}
        return {**ours, **names, UNREACHABLE: str(error)}
