"""Every pruning method, once: the pipeline, the command line and the studies read this table."""

from nirvana.errors import InputError
from nirvana.methods.method import Method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("nirvana", "arXiv 2509.14230", "weight_gradients", "modules", gamma=3.36, by_channel=True),
        Method(
            "fisher",
            "mask Fisher, arXiv 2204.09656; see nirvana.fisher",
            "input_gradients",
            "joint",
            attention_factor=2.0,  # docs/decisions/0018-attention-counts-twice.md
            seeded=True,
        ),
        Method("random", "none: the control", "nothing", "modules", seeded=True),
        Method("magnitude", "NIRVANA code, --prune_type magnitude", "weights", "modules", gamma=3.36),
        Method("wanda_sp", "arXiv 2306.11695; FLAP's prune_wanda_sp", "inputs", "layers"),
        Method("flap", "arXiv 2312.11983; CASIA-IVA-Lab/FLAP, WIFV, AL-AM", "inputs", "joint", per_weight=True),
        Method(
            "llm_pruner",
            "arXiv 2305.11627, block-wise, --taylor param_first",
            "weight_gradients",
            "layers",
            protected_layers=(3, 1),
        ),
        Method("lm_loss", "arXiv 1906.10771 within NIRVANA's allocation", "weight_gradients", "modules", gamma=3.36),
    )
}
SHORTGPT = "shortgpt"
"""It removes whole layers: no method of units, see `nirvana.methods.shortgpt`."""
SLICEGPT = "slicegpt"
"""It removes directions of the residual stream: no method of units, see `nirvana.methods.slicegpt`."""
WITHOUT_UNITS = (SHORTGPT, SLICEGPT)
NAMES = (*METHODS, *WITHOUT_UNITS)


def method_named(name: str) -> Method:
    """Return one of `METHODS`.

    Raises:
        InputError: If there is none of that name, or it is one that removes no units.
    """
    if name in WITHOUT_UNITS:
        raise InputError(f"methods: expected some that remove units, got {name}; leave it out")
    if name not in METHODS:
        raise InputError(f"methods: expected some of {', '.join(NAMES)}, got {name!r}; correct the name")
    return METHODS[name]
