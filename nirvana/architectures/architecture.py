"""What a family has to say about itself: its sites, its walk, its configuration.

A walk carries *streams*, one residual stream a stack: `(hidden,)` in a decoder-only model, `(encoder, decoder)` in an
encoder-decoder. Each layer maps streams to streams; the head reads the last one.
"""

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PretrainedConfig

from nirvana.architectures.followed import check_generic
from nirvana.architectures.site import Site

Streams = tuple[Float[Tensor, "_ _ hidden"], ...]
"""Hidden states of each residual stream for the same sequences."""
TokenIds = Int[Tensor, "batch _"]
Parameters = Mapping[str, Tensor]
Keep = Mapping[str, NDArray[np.int64]]


class Architecture(ABC):
    """Sites and walk of one model. Everything that differs between families is behind this interface."""

    model_type: ClassVar[str]
    """`model_type` of the family's stock configuration."""
    is_encoder_decoder: ClassVar[bool] = False
    gguf_layout: ClassVar[bool] = False
    """Whether llama.cpp computes this family with layers of different sizes: the layout of its `llama` and `deci`."""
    base_prefix: ClassVar[str] = ""
    """What the names of all parameters but the head's begin with; a model saved without its head has them without."""
    embedding_parameter: str
    """Name of the embedding's weight, which is also the head where the model has none of its own."""
    own_head_parameter = "lm_head.weight"
    """Name of the output head's weight where it is not the embedding's."""
    norm_prefix: str
    """What the parameter names of the normalisation before the head begin with."""

    def __init__(self, config: PretrainedConfig):
        check_generic(config, self.model_type, self.is_encoder_decoder)
        # The walk passes no mask where it can: only sdpa then remains causal.
        self.config = copy.deepcopy(config)
        self.config._attn_implementation = "sdpa"
        self._skeleton: Any = None
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._arguments: tuple[Any, list[dict[str, Any]]] = (None, [])

    # -- counts and names ----------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def num_layers(self) -> int:
        """Layers of all stacks together."""

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""
        return self.config.vocab_size

    @property
    @abstractmethod
    def hidden_size(self) -> int:
        """Width of the residual streams."""

    @abstractmethod
    def layer_prefix(self, layer: int) -> str:
        """Return what the parameter names of a layer begin with."""

    def layer_parameters(self, layer: int) -> list[str]:
        """Return the names of all parameters that a layer reads, as a dense checkpoint stores them or derives them."""
        return sorted(name for name in self.parameter_shapes if name.startswith(self.layer_prefix(layer)))

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter that the checkpoint must hold, by name."""
        if self._shapes is None:
            self._shapes = self._parameter_shapes()
        return self._shapes

    def _parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(weight.shape) for name, weight in self.skeleton.named_parameters()}

    def is_superfluous(self, name: str) -> bool:
        """Tell whether a checkpoint may hold this tensor although the model does not use it: tied copies, leftovers."""
        ignored = getattr(self.skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()
        tied = getattr(self.skeleton, "_tied_weights_keys", None) or ()
        # old checkpoints store the rotary frequencies
        return name in tied or name.endswith("rotary_emb.inv_freq") or any(re.search(key, name) for key in ignored)

    def stored_name(self, name: str) -> str:
        """Return the parameter that a dense checkpoint holds in place of one that it does not have."""
        return name

    def fused_place(self, name: str) -> tuple[str, tuple[int | slice, ...], tuple[int, ...]] | None:
        """Return where another layout of the family keeps a parameter: a tensor, the part of it, the tensor's shape."""
        return None

    def experts(self) -> tuple[int, int]:
        """Return how many experts a layer has and how many of them a token meets; (1, 1) without any."""
        return 1, 1

    @abstractmethod
    def layer_kind(self, layer: int) -> Hashable:
        """Return what makes a layer differ from others in code: layers of one kind run alike."""

    @abstractmethod
    def class_layers(self, model: Any) -> list[tuple[nn.Module, nn.Module]]:
        """Return the modules of a whole model that stand for each layer.

        Args:
            model: An instance of the stock or pruned class.

        Returns:
            A pair a layer: the module that runs it, and the one whose output is what leaves the layer in the walk.
        """

    def fused_parameters(self, layer: int) -> list[str]:
        """Return the parameters of a layer that `fuse` copies."""
        return []

    # -- sites and sizes -----------------------------------------------------------------------------------------

    @abstractmethod
    def sites(self) -> tuple[Site, ...]:
        """Return where units live, in walk order."""

    @abstractmethod
    def stock_overrides(self, keep: Keep) -> dict[str, Any] | None:
        """Return configuration values of the stock class for these kept units; None if it cannot express them."""

    @abstractmethod
    def layer_overrides(self, layer: int, kept_units: Mapping[str, int]) -> dict[str, int]:
        """Return the configuration values of one layer that keeps that many units at each of its sites."""

    @abstractmethod
    def pruned_overrides(self, kept_units: Mapping[str, int]) -> dict[str, Any]:
        """Return configuration values of the pruned class for layers that keep that many units."""

    def earlier_spellings(self) -> dict[str, Any]:
        """Return the configuration's values for readers that do not know transformers 5, with what they repeat."""
        rope = getattr(self.config, "rope_parameters", None)
        return {} if rope is None else {"rope_parameters": rope, **self._earlier_rope(rope)}

    def _earlier_rope(self, rope: Mapping[str, Any]) -> dict[str, Any]:
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        result = {"rope_theta": rope["rope_theta"]}
        if "partial_rotary_factor" in rope:
            result["partial_rotary_factor"] = rope["partial_rotary_factor"]
        return result | {"rope_scaling": None if rope["rope_type"] == "default" else scaling}

    def derived_parameters(self) -> list[str]:
        """Return parameters that only a checkpoint of the pruned class stores (see `stored_name`)."""
        return []

    # -- walk ----------------------------------------------------------------------------------------------------

    @property
    def skeleton(self) -> Any:
        """The model without weights (meta device): its modules hold the code of each step of the walk."""
        if self._skeleton is None:
            with torch.device("meta"):
                self._skeleton = self._build_skeleton().eval()
        return self._skeleton

    @abstractmethod
    def _build_skeleton(self) -> Any: ...

    @abstractmethod
    def layer_module(self, layer: int, kept_units: Mapping[str, int] | None = None) -> nn.Module:
        """Return the module of one layer, dense or with that many units; its parameters are on the meta device."""

    @property
    @abstractmethod
    def norm_module(self) -> nn.Module:
        """The normalisation between the last layer and the head."""

    embedding_scale: float = 1.0
    """Factor on embeddings (Gemma)."""
    output_scale: float = 1.0
    """Factor on what the head reads (T5)."""
    logit_softcap: float | None = None
    """Logits are c · tanh(logits / c) where it is set (Gemma)."""
    residual_scale: float | None = 1.0
    """What an output projection writes is multiplied by this and added to the stream; None where a norm comes between
    (Gemma)."""

    norm_offset: float = 0.0
    """The last norm multiplies by its weight plus this (Gemma: 1)."""

    def written_stream(self, layer: int) -> int:
        """Return which of the streams a layer adds to."""
        return 0

    def ends_in_addition(self, layer: int) -> bool:
        """Tell whether nothing follows when a layer has added its last output projection to the stream."""
        return self.residual_scale is not None

    def embed(self, vectors: Sequence[Tensor]) -> Streams:
        """Return the streams that enter layer 0, from the embeddings of each stream's token ids."""
        return tuple(vector * self.embedding_scale if self.embedding_scale != 1.0 else vector for vector in vectors)

    def layer_arguments(self, streams: Streams) -> list[dict[str, Any]]:
        """Return what each layer's forward needs besides streams, for sequences that start at position 0."""
        key = (tuple(stream.shape for stream in streams), streams[0].device)
        if self._arguments[0] != key:  # they depend on the shapes alone, and most walks have one or two of these
            self._arguments = (key, self._layer_arguments(streams))
        return self._arguments[1]

    @abstractmethod
    def _layer_arguments(self, streams: Streams) -> list[dict[str, Any]]: ...

    def fuse(self, layer: int, weights: Parameters) -> Parameters:
        """Return a layer's parameters as its module has them, by full name, from those that the checkpoint stores.

        Differentiable; the very same mapping where the two agree.
        """
        return weights

    def run_layer(
        self, layer: int, streams: Streams, arguments: Mapping[str, Any], weights: Parameters, module: nn.Module
    ) -> Streams:
        """Return the streams that leave a layer, run with the given parameters (as `fuse` returns them)."""
        return (self._call(module, weights, self.layer_prefix(layer), streams[0], arguments),)

    @staticmethod
    def _call(
        module: nn.Module, weights: Parameters, prefix: str, hidden: Tensor, arguments: Mapping[str, Any]
    ) -> Tensor:
        local = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        output = functional_call(module, local, (hidden,), dict(arguments))
        return output[0] if isinstance(output, tuple) else output
