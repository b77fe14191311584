"""NIRVANA: structured pruning of language models (arXiv 2509.14230).

Importing the package makes transformers know the pruned model classes, whichever of the two is imported first.
It is light: torch is loaded by the submodules that need it, on first use.
"""

import importlib
from pathlib import Path
from typing import Any

import wrapt

_EXPORTS = {
    "Allocation": "nirvana.allocation",
    "InputError": "nirvana.errors",
    "METHODS": "nirvana.methods.registry",
    "Plan": "nirvana.plan",
    "Stack": "nirvana.walk",
    "allocate": "nirvana.allocation",
    "channel_saliency": "nirvana.saliency",
    "compensate": "nirvana.compensation",
    "dense_hidden_states": "nirvana.walk",
    "final_hidden_states": "nirvana.walk",
    "kl_divergence": "nirvana.divergence",
    "mask_fisher": "nirvana.fisher",
    "model_digest": "nirvana.weights",
    "prune": "nirvana.surgery",
    "unit_saliency": "nirvana.saliency",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'nirvana' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def _register_first(wrapped: Any, _instance: Any, args: Any, kwargs: Any) -> Any:
    if _may_be_pruned(str(args[0] if args else next(iter(kwargs.values()), ""))):
        register = importlib.import_module("nirvana.checkpoint.modeling_nirvana").register
        for name in importlib.import_module("nirvana.architectures").family_names():
            register(name)
    return wrapped(*args, **kwargs)


def _may_be_pruned(name: str) -> bool:
    """Look before importing every family's classes: most models are not ours."""
    try:
        return b"nirvana_" in (Path(name) / "config.json").read_bytes()
    except (OSError, ValueError):  # a name on the hub, a folder of folders
        return True


def _wrap(configuration_auto: Any) -> None:
    # Every way to load a checkpoint by path asks AutoConfig first. Registering while transformers is still being
    # imported would run into its circular imports; at the first call all of it is there.
    for method in ("from_pretrained", "for_model"):
        wrapt.wrap_function_wrapper(configuration_auto, f"AutoConfig.{method}", _register_first)


wrapt.register_post_import_hook(_wrap, "transformers.models.auto.configuration_auto")
