"""NIRVANA: structured pruning of language models (arXiv 2509.14230).

Importing the package makes transformers know the pruned model classes, as soon as transformers itself is imported.
It is light: torch is loaded by the submodules that need it, on first use.
"""

import importlib
from typing import Any

import wrapt

_EXPORTS = {
    "InputError": "nirvana.errors",
    "Plan": "nirvana.plan",
    "Stack": "nirvana.walk",
    "allocate": "nirvana.allocation",
    "channel_saliency": "nirvana.saliency",
    "dense_hidden_states": "nirvana.divergence",
    "kl_divergence": "nirvana.divergence",
    "model_digest": "nirvana.weights",
    "prune": "nirvana.surgery",
    "unit_saliency": "nirvana.saliency",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'nirvana' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def _register(_modeling_auto: Any) -> None:
    importlib.import_module("nirvana.checkpoint.modeling_nirvana").register()


def _load_models(_configuration_auto: Any) -> None:
    # Harmless where that module is what is being imported: then it is in sys.modules and registers when complete.
    importlib.import_module("transformers.models.auto.modeling_auto")


wrapt.register_post_import_hook(_load_models, "transformers.models.auto.configuration_auto")
wrapt.register_post_import_hook(_register, "transformers.models.auto.modeling_auto")
