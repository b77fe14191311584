"""Where the files of a model keep each parameter of its family's class: one mapping that everything reads through.

Names in files differ from those of the class in ways that are not the model's own:

- a model saved without its head (`AutoModel.save_pretrained`) has no `model.` before them,
- inside a wrapper (a model of text and pictures, torch.compile, a trainer) they have other prefixes,
- experts are stored one by one, or fused,
- of an embedding that is also the head either name may be the one that was stored.

What is written has the class's own names.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from nirvana.architectures.architecture import Architecture
from nirvana.errors import InputError
from nirvana.weights import FLOAT_TYPES, Stored, WeightFiles

_OF_QUANTISATION = re.compile(r"qweight|qzeros|scales?|weight_\w+|\w+_scale(_inv)?|SCB|absmax|quant_\w+|\w+_zero_point")


@dataclass(frozen=True)
class Layout:
    """How the files of a model name its parameters."""

    prefix: str
    """What stands before the names of the model without its head, in place of the class's own `base_prefix`."""
    stored: dict[str, Stored]
    """Each parameter's place by the class's name for it; then what is no parameter, by its own."""

    def is_read_by(self, architecture: Architecture) -> bool:
        """Tell whether transformers finds the parameters too: it adds the class's own prefix, or takes it away."""
        return self.prefix in (architecture.base_prefix, "", f"{architecture.skeleton.base_model_prefix}.")


def layout_of(architecture: Architecture, weights: WeightFiles) -> Layout:
    """Find where the parameters of a model lie in its files.

    Args:
        architecture: The model.
        weights: Its files, not yet arranged.

    Raises:
        InputError: If fused experts are of another shape than the configuration says.
    """
    prefix = _prefix(architecture, set(weights))
    stored = {_class_name(architecture, prefix, name): Stored(name) for name in weights}
    _untie(architecture, stored)
    _unfuse(architecture, stored, weights)
    return Layout(prefix, stored)


def has_layer(architecture: Architecture, layer: int, names: Collection[str]) -> bool:
    """Tell whether files hold anything of a layer, under whatever prefix; no module is built to find out."""
    tail = architecture.layer_prefix(layer).removeprefix(architecture.base_prefix)
    return any(name.startswith(tail) or f".{tail}" in name for name in names)


def _prefix(architecture: Architecture, names: set[str]) -> str:
    """Return what stands before the names; the class's own where that is not clear, and the check names what lacks."""
    own = architecture.base_prefix
    norm = next((name for name in architecture.parameter_shapes if name.startswith(architecture.norm_prefix)), "")
    for anchor in (architecture.embedding_parameter, norm):
        tail = anchor.removeprefix(own)
        found = {name[: -len(tail)] for name in names if tail and (name == tail or name.endswith(f".{tail}"))}
        if own in found:
            return own
        whole = [each for each in found if any(name.startswith(each + _layers(architecture)) for name in names)]
        if len(whole) == 1:
            return whole[0]
    return own


def _layers(architecture: Architecture) -> str:
    return architecture.layer_prefix(0).removeprefix(architecture.base_prefix)


def _outer(prefix: str) -> Iterator[str]:
    """Yield a prefix and what remains of it as its last parts are taken away: a head stands beside the model."""
    parts = prefix.split(".")[:-1]
    for count in range(len(parts), -1, -1):
        yield "".join(f"{part}." for part in parts[:count])


def _class_name(architecture: Architecture, prefix: str, name: str) -> str:
    """Return the class's name of a stored tensor."""
    if prefix == architecture.base_prefix:
        return name
    if name in [outer + architecture.own_head_parameter for outer in _outer(prefix)]:
        return architecture.own_head_parameter
    return architecture.base_prefix + name.removeprefix(prefix) if name.startswith(prefix) else name


def _untie(architecture: Architecture, stored: dict[str, Stored]) -> None:
    """Find the embedding under another of the names that share it, where only that one was stored."""
    embedding, shapes = architecture.embedding_parameter, architecture.parameter_shapes
    if embedding in stored:
        return
    tied = getattr(architecture.skeleton, "_tied_weights_keys", None) or ()
    for name in sorted(tied, key=lambda name: name == architecture.own_head_parameter):
        if name in stored and name not in shapes:
            stored[embedding] = stored.pop(name)
            return


def _unfuse(architecture: Architecture, stored: dict[str, Stored], weights: WeightFiles) -> None:
    """Find parameters inside tensors that hold several of them."""
    fused: set[str] = set()
    for name in architecture.parameter_shapes.keys() - stored.keys():
        place = architecture.fused_place(name)
        if place is None or place[0] not in stored:
            continue
        whole, part, shape = place
        found = weights.shape(stored[whole].name)
        if found != shape:
            raise InputError(
                f"{whole}: expected shape {shape} as config.json says, got {found}; "
                "the configuration and the weights do not belong together"
            )
        stored[name] = Stored(stored[whole].name, part)
        fused.add(whole)
    for name in fused:
        del stored[name]


def check_parameters(architecture: Architecture, weights: WeightFiles, within: str = "") -> None:
    """Find a missing, odd or misshapen parameter now rather than in the middle of a walk.

    Args:
        architecture: The model.
        weights: Its files, arranged.
        within: Only tensors whose stored names begin with this have to be parameters.

    Raises:
        InputError: If there is one.
    """
    shapes, head = architecture.parameter_shapes, architecture.own_head_parameter
    if head in shapes and head not in weights:
        raise InputError(
            f"{head}: expected the output head of its own that config.json says (tie_word_embeddings is false), found "
            "none: the model was saved without it; save it again with AutoModelForCausalLM, or write "
            '"tie_word_embeddings": true if the embedding is its head'
        )
    for name, expected in shapes.items():
        if weights.shape(name) != expected:
            raise InputError(
                f"{name}: expected shape {expected} as config.json says, got {weights.shape(name)}; "
                "the configuration and the weights do not belong together"
            )
    for name, stored in weights.layout.items():
        known = name in shapes or name == head
        odd = not known and not architecture.is_superfluous(name) and stored.name.startswith(within)
        if odd or (known and weights.dtype(name) not in FLOAT_TYPES):
            quantised = weights.dtype(name) not in FLOAT_TYPES or _OF_QUANTISATION.fullmatch(name.rsplit(".", 1)[-1])
            remedy = "if it is quantised, prune the model it was made from" if quantised else "choose another model"
            raise InputError(
                f"{stored.name}: expected the parameters of a {architecture.model_type} model in "
                f"{', '.join(FLOAT_TYPES)}, got this one in {weights.dtype(name)}; {remedy}"
            )
