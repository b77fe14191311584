"""What a plan says twice of a site: its layer and its module, once by themselves and once in its name."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nirvana.errors import InputError

if TYPE_CHECKING:
    from nirvana.plan import PlannedSite

# what the last part of a site's name says
_MODULE_OF = {
    "kv_group": "attention",
    "self_attention": "attention",
    "cross_attention": "attention",
    "mlp_neuron": "mlp",
}


def check_told_once(sites: Sequence["PlannedSite"]) -> None:
    """Refuse sites whose `layer` or `module` is not what their names say.

    A name such as `decoder.3.mlp_neuron` counts layers within its stack; stacks follow one another.

    Raises:
        InputError: If they differ.
    """
    starts = _stack_starts(sites)
    for site in sites:
        said = _MODULE_OF.get(site.name.rpartition(".")[2], site.module)
        if said != site.module:
            raise InputError(
                f"sites: expected module {said} at {site.name}, as its name says, got {site.module}; "
                "make the plan again"
            )
        stack, number = _place(site.name)
        if number is not None and site.layer != starts[stack] + number:
            raise InputError(
                f"sites: expected layer {starts[stack] + number} at {site.name}, as its name says, got {site.layer}; "
                "make the plan again"
            )


def _stack_starts(sites: Sequence["PlannedSite"]) -> dict[str, int]:
    """Return the layer that each stack's first one is: the stack of the smallest layer comes first."""
    sizes: dict[str, int] = {}
    for site in sorted(sites, key=lambda site: site.layer):
        stack, number = _place(site.name)
        if number is not None:
            sizes[stack] = max(sizes.get(stack, 0), number + 1)
    starts, start = {}, 0
    for stack, size in sizes.items():
        starts[stack] = start
        start += size
    return starts


def _place(name: str) -> tuple[str, int | None]:
    """Return the stack that a site's name begins with, and its layer there: `("layers", 3)`."""
    stack, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return stack, int(number) if number.isascii() and number.isdigit() and len(number) <= 7 else None
