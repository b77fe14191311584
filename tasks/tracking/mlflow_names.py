"""Names and values that MLflow takes: one that it refuses costs every other of its batch."""

import hashlib
import posixpath
import re
from collections.abc import Iterable

LONGEST_NAME = 250
LONGEST_PARAMETER = 6000
LONGEST_TAG = 5000
LONGEST_SOURCE = 65_000
NAMES_AT_ONCE = 100
"""Parameters or tags that the server takes in one call."""

# as mlflow.utils.validation; \w knows all alphabets
_REFUSED = re.compile(r"[^/\w.\- :]")


def fit_names(names: Iterable[str]) -> dict[str, str]:
    """Return for each name what MLflow calls it: itself where that is allowed, else the nearest, no two alike.

    A name that had to be changed into one that is taken has part of its digest behind it.
    """
    wanted = list(dict.fromkeys(names))
    fit = {name: name for name in wanted if _nearest(name) == name}
    taken = set(fit.values())
    for name in wanted:
        if name in fit:
            continue
        near = _nearest(name)
        if near in taken:
            near = f"{near[: LONGEST_NAME - 9]}_{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:8]}"
        fit[name] = near
        taken.add(near)
    return {name: fit[name] for name in wanted}


def _nearest(name: str) -> str:
    """Return a name of allowed characters that is no path to somewhere else."""
    text = _REFUSED.sub("_", name)
    parts = [part if part.strip(".") else part.replace(".", "_") for part in text.split("/") if part]
    text = "/".join(parts) or "_"
    if len(text) > LONGEST_NAME:
        text = f"{text[: LONGEST_NAME - 9]}_{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:8]}"
    return posixpath.normpath(text)


def fit_value(value: object, longest: int = LONGEST_PARAMETER) -> str:
    """Return a value as text that is not longer than MLflow takes; what is cut off shows as an ellipsis."""
    text = str(value)
    return text if len(text) <= longest else f"{text[: longest - 4]} ..."
