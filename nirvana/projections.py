"""The matrices through which units write into the residual stream, and what flows through them.

Every unit acts on the model through its columns of one matrix: `o_proj` for a KV group, `down_proj` for a neuron.
What enters that matrix is what a mask on the unit would scale, and what the kept units have to make do with.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nirvana.architectures.architecture import Architecture
from nirvana.architectures.site import Site, Slot
from nirvana.errors import InputError


@dataclass(frozen=True)
class OutputProjection:
    """One site's output matrix: `[hidden, units · block]`."""

    site: Site
    slot: Slot

    @property
    def name(self) -> str:
        """Full name of the matrix in the checkpoint."""
        return self.slot.parameter

    @property
    def bias_name(self) -> str:
        """Full name of what the matrix's module adds, where it has a bias."""
        return self.name.removesuffix("weight") + "bias"

    def path_in(self, architecture: Architecture) -> str:
        """Return where the layer's module has the submodule that multiplies by the matrix."""
        return self.name.removeprefix(architecture.layer_prefix(self.site.layer)).removesuffix(".weight")


def output_projections(architecture: Architecture) -> dict[int, list[OutputProjection]]:
    """Return the output projections of each layer, in the order in which a layer runs them.

    Raises:
        InputError: If units write through a matrix that is no module of its own, such as those of fused experts.
    """
    found: dict[int, list[OutputProjection]] = {}
    for site in architecture.sites():
        (slot,) = (slot for slot in site.weight_slots if slot.dim == 1)
        projection = OutputProjection(site, slot)
        path = projection.path_in(architecture)
        try:
            architecture.layer_module(site.layer).get_submodule(path)
        except AttributeError:
            raise InputError(
                f"{site.name}: expected an output projection that is a module of its own, got one that is fused with "
                f"others in {architecture.model_type}; use saliency.method nirvana and no compensation"
            ) from None
        found.setdefault(site.layer, []).append(projection)
    return found


class Reached(Exception):  # noqa: N818  (no error: it ends a forward that has shown what it was run for)
    """Raised inside a forward pass that need not go on."""


@contextmanager
def recorded_inputs(module: nn.Module, paths: Sequence[str], stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """Keep what enters some submodules in each forward until the context ends.

    Args:
        module: A layer.
        paths: Submodules of it.
        stop: Raise `Reached` at the first of them instead of running on.

    Yields:
        The last input of each, by path; part of the autograd graph where there is one.
    """
    seen: dict[str, Tensor] = {}

    def hang(submodule: nn.Module, path: str) -> RemovableHandle:
        def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen[path] = arguments[0]
            if stop:
                raise Reached

        return submodule.register_forward_pre_hook(keep)

    with _hung(module, paths, hang):
        yield seen


@contextmanager
def recorded_outputs(module: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Keep what leaves some submodules in each forward until the context ends.

    Args:
        module: A layer.
        paths: Submodules of it.

    Yields:
        The last output of each, by path.
    """
    seen: dict[str, Tensor] = {}

    def hang(submodule: nn.Module, path: str) -> RemovableHandle:
        return submodule.register_forward_hook(lambda _, arguments, output: seen.__setitem__(path, output))

    with _hung(module, paths, hang):
        yield seen


@contextmanager
def _hung(module: nn.Module, paths: Sequence[str], hang: Callable[[nn.Module, str], RemovableHandle]) -> Iterator[None]:
    """Keep a hook on each of some submodules until the context ends."""
    handles = [hang(module.get_submodule(path), path) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
