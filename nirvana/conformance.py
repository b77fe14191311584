"""Whether the walk computes what transformers' own class does, on real tokens and real weights.

A description that does not follow a switch of a configuration gives numbers that look right. So the two are compared
before anything is computed from a model, and before a pruned checkpoint gets its name: the stream that leaves each
layer that shows a kind of layer, and the logits. Small models are loaded as a user loads them; of large ones the class
gets the weights of one layer at a time, and the layers that show nothing new are left out on both sides.
"""

import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import nirvana
from nirvana.checkpoint.prose import PROSE
from nirvana.checkpoint.tokenizer import read_tokenizer
from nirvana.compensated_weights import compensated_parameters
from nirvana.errors import InputError
from nirvana.files import read_json, write_json
from nirvana.head import head_logits
from nirvana.loading import auto_class, load_model
from nirvana.masking import masked_stack
from nirvana.plan import Plan
from nirvana.switches import unknown_keys, unusual_keys
from nirvana.walk import Ids, Stack, as_streams
from nirvana.weights import weight_files

_LOG = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest difference that passes, relative to the largest value of the class: float32 sums in another order differ by
some 1e-6, a switch that is not followed by 1e-2 and more."""
_MOST_FELT, _ROUNDINGS = 1e-2, 10
"""Where a model blows up what is rounded (random weights, gains far from 1), so many times what one rounding of its
embeddings does to it passes too, up to a limit below what a switch does."""
WHOLE_BYTES = 1 << 26
"""Largest model in float32 that is loaded whole, and run through all of its layers."""
_SHORT, _LONG = 20, 72  # tokens
_LONGEST = 640  # a window or context beyond this is not exceeded: attention alone would take longer than all else
_HEAD_ROWS, _HEAD_POSITIONS = 4096, 8


@dataclasses.dataclass(frozen=True)
class Conformance:
    """What comparing a walk with a class found."""

    layers: tuple[int, ...]
    """Layers that were run."""
    tokens: tuple[int, ...]
    """Length of each text."""
    whole: bool
    """Whether the class was loaded whole, as a user loads it."""
    largest_difference: float
    """Largest difference of a compared tensor, relative to that tensor's largest value."""


@torch.no_grad()
def check_walk(model_directory: Path | str, ids: Ids | None = None) -> Conformance:
    """Compare the walk of a model with transformers' own class.

    Args:
        model_directory: A dense model, or a pruned checkpoint.
        ids: Sequences to compare on instead of texts of our own, each on its own.

    Raises:
        InputError: If they differ by more than `TOLERANCE`, or the class cannot run the model; the message names the
            first layer that differs and the keys of the configuration that the description may not know.
    """
    stack = Stack.open(model_directory, execution="streamed")
    expected = f"expected the walk to compute what transformers' {_class_name(stack)} does"

    def remedy() -> str:
        unknown = ", ".join(unknown_keys(stack.architecture.skeleton, stack.architecture.model_type)) or "none"
        return (
            f"keys that the class reads and the description of {stack.architecture.model_type} does not: {unknown}; "
            "choose another model, or follow the key in nirvana/architectures/"
        )

    return _compared(stack, stack, Path(model_directory), ids, expected, remedy)


@torch.no_grad()
def check_written(checkpoint: Path | str, dense: Stack, plan: Plan) -> Conformance:
    """Compare a pruned checkpoint, loaded in its class, with the walk of the dense model masked by its plan.

    What compensation has solved for no plan says: that is taken from the checkpoint.

    Args:
        checkpoint: What was written.
        dense: The model that it was cut from.
        plan: Which units stay.

    Raises:
        InputError: If they differ by more than `TOLERANCE`, or the class cannot run what was written.
    """
    pruned = Stack.open(checkpoint, execution="streamed")
    updates = None
    if plan.compensation is not None:
        updates = {name: pruned.weights[name] for name in sorted(compensated_parameters(dense.architecture))}
    on_cpu = dataclasses.replace(dense, device=torch.device("cpu"), execution="streamed")
    masked = masked_stack(on_cpu, plan.keep, updates)
    expected = f"expected {_class_name(pruned)} to compute what the dense model masked by the plan does"
    remedy = "nothing was written: the files are damaged on this disk, or this is a fault of ours: report it"
    return _compared(masked, pruned, Path(checkpoint), None, expected, lambda: remedy)


def _class_name(stack: Stack) -> str:
    return type(stack.architecture.skeleton).__name__


def _compared(
    reference: Stack, stack: Stack, directory: Path, ids: Ids | None, expected: str, remedy: Callable[[], str]
) -> Conformance:
    """Compare a walk with the class that loads a directory."""
    texts = _texts(stack, directory) if ids is None else _each_sequence(ids)
    for text in texts:
        stack.check_ids(text)
    with _quiet():
        loaded = _Class.of(stack, directory)
        shown = _shown_layers(stack, loaded.whole)
        with _cannot_run(directory, f"transformers' {_class_name(stack)}", loaded.model):
            found = [loaded.run(shown, text) for text in texts]
        with _cannot_run(directory, "the walk", loaded.model):
            walked = _walk(reference, shown, texts)
    differences = _differences(found, walked, shown)
    if not all(each.relative <= TOLERANCE for each in differences):  # NaN is not
        felt = _differences(walked, _walk(reference, shown, texts, rounded=True), shown)
        for difference, of_rounding in zip(differences, felt, strict=True):
            if not difference.relative <= max(TOLERANCE, min(_MOST_FELT, _ROUNDINGS * of_rounding.relative)):
                raise InputError(f"{directory}: {expected}, got {difference.line()}; {remedy()}")
    return Conformance(
        layers=tuple(shown),
        tokens=tuple(as_streams(text)[-1].shape[1] for text in texts),
        whole=loaded.whole,
        largest_difference=float(f"{max(each.relative for each in differences):.3e}"),
    )


@contextmanager
def _cannot_run(directory: Path, what: str, model: Any) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever comes of odd values: no common class
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise InputError(
            f"{directory}: expected a model that {what} can run, got {cause}; its unusual keys are "
            f"{', '.join(unusual_keys(model)) or 'none'}: correct its config.json, or choose another model"
        ) from error


def check_walk_once(model_directory: Path | str, cache: Path | str) -> Conformance:
    """Compare as `check_walk` does, unless that was done for this model, code and release; later calls look it up.

    Args:
        model_directory: A dense model.
        cache: Directory that keeps what was found, one small file a model; it may be missing.

    Raises:
        InputError: See `check_walk`.
    """
    kept = Path(cache) / f"{layout_digest(model_directory)}.json"
    try:
        found = read_json(kept)
        return Conformance(**found | {key: tuple(found[key]) for key in ("layers", "tokens")})
    except (InputError, OSError, TypeError, KeyError, ValueError):
        pass  # not kept, or not whole: compared (again)
    conformance = check_walk(model_directory)
    try:
        write_json(kept, dataclasses.asdict(conformance))
    except OSError as error:
        _LOG.info("%s: not kept, it is compared again next time (%s)", kept, error)
    return conformance


def layout_digest(model_directory: Path | str) -> str:
    """Return a digest of all that the comparison depends on, without reading the weights themselves.

    Configuration; names, types, shapes and sizes of the tensors; releases of transformers and torch; our own code.
    Other values of the weights are the same computation.
    """
    directory = Path(model_directory)
    digest = hashlib.sha256(f"{transformers.__version__} {torch.__version__}\n".encode())
    root = Path(nirvana.__file__).parent
    code = [root / "walk.py", root / "conformance.py", root / "weights.py", *sorted(root.glob("architectures/*.py"))]
    for file in [*code, root / "checkpoint" / "modeling_nirvana.py", directory / "config.json"]:
        digest.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    for file in weight_files(directory):
        with file.open("rb") as content:
            prefix = content.read(8)
            header = content.read(min(int.from_bytes(prefix, "little"), 100 << 20))
        digest.update(f"{file.name} {file.stat().st_size} {hashlib.sha256(header).hexdigest()}\n".encode())
    return digest.hexdigest()


# -- what is compared ------------------------------------------------------------------------------------------------


def _shown_layers(stack: Stack, every: bool) -> list[int]:
    """Return the first two layers, the first two of each kind, or all."""
    if every:
        return list(range(stack.num_layers))
    shown: dict[Any, list[int]] = {}
    for layer in range(stack.num_layers):
        shown.setdefault(stack.architecture.layer_kind(layer), []).append(layer)
    return sorted({layer for layers in shown.values() for layer in layers[:2]})


def _texts(stack: Stack, directory: Path) -> list[Ids]:
    """Return a short text, a longer one that leaves windows and contexts behind where they are small, a short one.

    The last shows what a class or a walk keeps of the text before it.
    """
    config, vocabulary = stack.architecture.config, stack.architecture.vocab_size
    rope = getattr(config, "rope_parameters", None) or {}
    limits = [getattr(config, "sliding_window", None), getattr(config, "max_position_embeddings", None)]
    limits += [
        each.get("original_max_position_embeddings") for each in (rope, *rope.values()) if isinstance(each, dict)
    ]
    limits.append(getattr(config, "original_max_position_embeddings", None))
    longest = max([_LONG, *(limit + 9 for limit in limits if isinstance(limit, int) and 0 < limit + 9 <= _LONGEST)])
    tokens = _tokens(directory, vocabulary)
    tokens = (tokens * (1 + 2 * longest // len(tokens)))[: 2 * longest]
    texts: list[Ids] = []
    for length in (_SHORT, longest, _SHORT + 1):
        row = torch.tensor(tokens[:length])[None]
        start = getattr(config, "decoder_start_token_id", None) or 0
        target = torch.tensor([start, *tokens[longest : longest + length - 5]])[None]
        texts.append((row, target) if stack.architecture.is_encoder_decoder else row)
    return texts


def _tokens(directory: Path, vocabulary: int) -> list[int]:
    """Return the ids of a text of ours; without a tokenizer that fits, ids spread over the vocabulary."""
    try:
        tokens = list(read_tokenizer(directory)(PROSE)["input_ids"])
        if len(tokens) > _SHORT and max(tokens) < vocabulary:
            return tokens
    except Exception as error:  # a tokenizer is not what is checked here
        _LOG.debug("%s: compared on fixed ids (%s)", directory, error)
    return [7919 * index % vocabulary for index in range(1, 2 * _LONG)]


def _each_sequence(ids: Ids) -> list[Ids]:
    streams = as_streams(ids)
    rows = [tuple(stream[row : row + 1] for stream in streams) for row in range(len(streams[0]))]
    return [row if isinstance(ids, tuple) else row[0] for row in rows]


@dataclasses.dataclass
class _Outputs:
    """What left each layer that ran, and the logits of the last positions for the first rows of the head."""

    layers: dict[int, Tensor]
    logits: Tensor


def _walk(stack: Stack, shown: Sequence[int], texts: Sequence[Ids], rounded: bool = False) -> list[_Outputs]:
    """Run texts through the layers that are shown; `rounded`: with embeddings that are off by a bit."""
    architecture = stack.architecture
    streams = [stack.embed(text) for text in texts]
    if rounded:
        streams = [tuple(_off_by_a_bit(stream) for stream in each) for each in streams]
    outputs: list[dict[int, Tensor]] = [{} for _ in texts]
    for layer, weights in stack.layers(shown):
        fused = architecture.fuse(layer, weights)
        streams = [stack.run_layer(layer, each, fused) for each in streams]
        for left, each in zip(outputs, streams, strict=True):
            left[layer] = each[architecture.written_stream(layer)]
    head = stack.head_weight()[:_HEAD_ROWS].float()
    ends = [stack.head_input(each)[0, -_HEAD_POSITIONS:] for each in streams]
    logits = [head_logits(end, head, architecture.logit_softcap) for end in ends]
    return [_Outputs(left, each) for left, each in zip(outputs, logits, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Difference:
    place: str
    absolute: float
    scale: float

    @property
    def relative(self) -> float:
        if self.absolute == 0:
            return 0.0
        return self.absolute / self.scale if self.scale else math.inf

    def line(self) -> str:
        return f"a difference of {self.absolute:.3g} where the largest value is {self.scale:.3g}, first in {self.place}"


def _differences(found: Sequence[_Outputs], walked: Sequence[_Outputs], shown: Sequence[int]) -> list[_Difference]:
    """Return how far each tensor of each text differs, in the order in which they are computed."""
    differences = []
    for one, other in zip(found, walked, strict=True):
        places = [(f"what leaves layer {layer}", one.layers[layer], other.layers[layer]) for layer in shown]
        for place, of_class, of_walk in [*places, ("the logits", one.logits, other.logits)]:
            far = (of_class - of_walk).abs().max().item()
            differences.append(_Difference(place, far, of_class.abs().max().item()))
    return differences


def _off_by_a_bit(stream: Tensor) -> Tensor:
    """Return a stream whose values are moved by their last bit, up or down."""
    signs = 1 - 2 * (torch.arange(stream.numel(), device=stream.device) * 7919 // 13 % 2).view(stream.shape)
    return stream * (1 + torch.finfo(stream.dtype).eps * signs)


# -- transformers' class ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Class:
    """An instance of transformers' class of a model."""

    model: Any
    stack: Stack
    whole: bool

    @classmethod
    def of(cls, stack: Stack, directory: Path) -> "_Class":
        """Load a small model; of a large one take the code, and weights when they are needed."""
        size = sum(4 * math.prod(stack.weights.shape(name)) for name in stack.weights)
        if size <= WHOLE_BYTES:
            return cls(load_model(directory), stack, whole=True)
        config = stack.architecture.config
        with _parameters_on_meta():
            model = auto_class(config).from_config(config).eval()
        return cls(model, stack, whole=False)

    def run(self, shown: Sequence[int], ids: Ids) -> _Outputs:
        """Return what a fresh instance computes: some rotary embeddings remember the text before."""
        for module in list(self.model.modules()):
            if hasattr(module, "rotary_emb"):
                module.rotary_emb = type(module.rotary_emb)(config=module.config)
        streams = as_streams(ids)
        if not self.whole:
            streams = self._take_embeddings(streams)
        left: dict[int, Tensor] = {}
        hooks = self._hooks(shown, left)
        names = ("input_ids", "decoder_input_ids")
        settings = {} if self.whole else {"use_cache": False}
        try:
            logits = self.model(**dict(zip(names, streams, strict=False)), **settings).logits
        finally:
            for hook in hooks:
                hook.remove()
        return _Outputs(left, logits[0, -_HEAD_POSITIONS:, :_HEAD_ROWS])

    def _hooks(self, shown: Sequence[int], left: dict[int, Tensor]) -> list[Any]:
        architecture, hooks = self.stack.architecture, []
        for layer, (runs, leaves) in enumerate(architecture.class_layers(self.model)):
            if layer in shown:
                hooks.append(leaves.register_forward_hook(_Keep(left, layer)))
                if not self.whole:
                    hooks.append(runs.register_forward_pre_hook(_Load(self.stack, layer)))
                    hooks.append(runs.register_forward_hook(_free, always_call=True))
            elif not self.whole:
                runs.forward = _skip
        return hooks

    def _take_embeddings(self, streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Give the class the rows that these ids name, the head's first rows and the last norms; return their ids."""
        stack, model = self.stack, self.model
        rows, places = torch.unique(torch.cat([stream.flatten() for stream in streams]), return_inverse=True)
        table = stack.weights[stack.architecture.embedding_parameter]
        vectors = nn.Parameter(table[rows].float())
        inside = {id(part) for runs, _ in stack.architecture.class_layers(model) for part in runs.modules()}
        for module in model.modules():
            if isinstance(module, nn.Embedding) and id(module) not in inside:
                module.weight, module.padding_idx = vectors, None
        model.get_output_embeddings().weight = nn.Parameter(stack.head_weight()[:_HEAD_ROWS].float())
        for name, parameter in list(model.named_parameters()):
            module, _, own = name.rpartition(".")
            if parameter.is_meta and id(model.get_submodule(module)) not in inside:
                setattr(model.get_submodule(module), own, nn.Parameter(stack.parameter(name)))
        sizes = [stream.numel() for stream in streams]
        return tuple(part.view(1, -1) for part in places.split(sizes))


@dataclasses.dataclass
class _Keep:
    left: dict[int, Tensor]
    layer: int

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.left[self.layer] = output[0] if isinstance(output, tuple) else output


@dataclasses.dataclass
class _Load:
    stack: Stack
    layer: int

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        architecture = self.stack.architecture
        weights = architecture.fuse(self.layer, self.stack.layer_weights(self.layer))
        prefix = architecture.layer_prefix(self.layer)
        local = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        missing, _ = module.load_state_dict(local, strict=False, assign=True)
        if missing:
            raise KeyError(f"no weights for {prefix}{missing[0]}")


def _free(module: nn.Module, inputs: Any, output: Any) -> None:
    module.to_empty(device="meta")


def _skip(hidden: Tensor, *others: Any, **named: Any) -> Any:
    """Stand for a layer that shows nothing new; T5's blocks hand on two position biases as well."""
    return (hidden, others[1], others[4]) if len(others) > 4 else hidden


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Build modules whose parameters take no memory; their buffers, which no file holds, get values."""
    original = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(module, name, None if param is None else nn.Parameter(param.to("meta")))

    nn.Module.register_parameter = on_meta  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[assignment,method-assign]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from remarks about a model that is only compared."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
