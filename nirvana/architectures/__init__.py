"""The only place that knows model families: for each, its sites and its walk.

A module here that is not one of the shared ones describes the family of its name: the file name is the `model_type`
of the family's stock configuration, and nothing else lists the families.
"""

import pkgutil

_SHARED = {"architecture", "decoder", "followed", "registry", "site", "wrappers"}


def family_names() -> list[str]:
    """Return the `model_type` of every family, without importing any of them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED)
