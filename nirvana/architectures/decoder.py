"""What the decoder-only families share: grouped-query attention, a gated MLP, and the walk over both."""

import copy
from collections.abc import Hashable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from nirvana.architectures.architecture import Architecture, Keep, Streams
from nirvana.architectures.followed import json_of
from nirvana.architectures.site import Site, Slot
from nirvana.errors import InputError

_MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


def head_dim_of(config: PretrainedConfig) -> int:
    """Return the head dimension: explicit where the configuration has it (Qwen3: not hidden / heads)."""
    explicit = getattr(config, "head_dim", None)
    return explicit if explicit is not None else config.hidden_size // config.num_attention_heads


class DecoderArchitecture(Architecture):
    """Sites and walk of a decoder-only causal language model.

    The common layout: `model.embed_tokens`, `model.layers.N.self_attn.{q,k,v,o}_proj`,
    `model.layers.N.mlp.{gate,up,down}_proj`, `model.norm`, `lm_head` (absent when tied). A family says where it
    deviates: a class attribute where the difference is a value, a method where it is a layout.
    """

    base_prefix = "model."
    embedding_parameter = "model.embed_tokens.weight"
    norm_prefix = "model.norm."
    qkv_bias: bool | str = False
    """Whether q, k and v carry biases, or the configuration key that says so."""
    attention: Literal["full", "window", "by_layer"] = "full"
    """Full in every layer; in a window if the configuration has one; or as `layer_types` says. A family that has no
    windows ignores the key, and so must the walk."""
    mlp_bias: bool | str = False
    """Whether gate and up carry biases, or the configuration key that says so."""

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        self._check_layer_types()
        self._check_own_sizes()

    def _check_layer_types(self) -> None:
        """Refuse kinds of attention that the family's class cannot run, or runs in one forward and not in the next.

        Raises:
            InputError: If `layer_types` has another kind than the two, a window without `sliding_window`, or, in a
                family whose class runs one kind in all layers and sizes its cache by `layer_types`, two kinds.
        """
        kinds = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None)
        if kinds is None:
            return
        cause = None
        if not set(kinds) <= set(_MASKS):
            cause = f"{json_of(sorted(set(kinds) - set(_MASKS)))}, which no {self.model_type} class computes"
        elif "sliding_attention" in kinds and window is None:
            switched = " (use_sliding_window is false)" if hasattr(self.config, "use_sliding_window") else ""
            cause = f"sliding_attention without a sliding_window{switched}"
        elif self.attention == "window" and window is not None and len(set(kinds)) > 1:
            cause = f"two kinds, and {self.model_type}'s class runs one in all layers"
        elif self.attention == "by_layer" and len(kinds) != self.num_layers:
            cause = f"{len(kinds)} for {self.num_layers} layers"
        if cause is not None:
            raise InputError(
                f"config.json: expected layer_types of {' and '.join(_MASKS)} that the model's class can run, got "
                f"{cause}; correct layer_types, or choose another model"
            )

    def _check_own_sizes(self) -> None:
        """Refuse a pruned configuration whose layers differ in more than what pruning changes.

        Raises:
            InputError: If there is such a key.
        """
        if not self.config.is_heterogeneous:
            return
        sizes = {"num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size"}
        for own in self.config.to_dict()["per_layer_config"].values():
            if not set(own) <= sizes:
                raise InputError(
                    f"config.json: expected per_layer_config with {', '.join(sorted(sizes))}, got "
                    f"{', '.join(sorted(set(own) - sizes))} too, which the pruned class does not follow; prune again"
                )

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.config.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.config.hidden_size

    def layer_prefix(self, layer: int) -> str:
        """Return what all parameter names of a layer begin with."""
        return f"model.layers.{layer}."

    def has(self, flag: bool | str) -> bool:
        """Return a flag's value: itself, or what the configuration says under that key."""
        return bool(getattr(self.config, flag, False)) if isinstance(flag, str) else flag

    def layer_kind(self, layer: int) -> Hashable:
        """Return the kind of attention."""
        return self.attention_kinds()[layer]

    def class_layers(self, model: Any) -> list[tuple[nn.Module, nn.Module]]:
        """Return each decoder layer, twice."""
        return [(layer, layer) for layer in model.model.layers]

    # -- sites ---------------------------------------------------------------------------------------------------

    def sites(self) -> tuple[Site, ...]:
        """Return the KV-group and MLP-neuron sites of every layer, in walk order."""
        result: list[Site] = []
        for layer in range(self.num_layers):
            config = self.config.per_layer_config[layer]
            slots = self._attention_slots(self.layer_prefix(layer) + "self_attn.", config)
            result.append(Site(f"layers.{layer}.kv_group", "attention", layer, config.num_key_value_heads, slots))
            result += self._mlp_sites(layer, config)
        return tuple(result)

    def _attention_slots(self, prefix: str, config: PretrainedConfig) -> tuple[Slot, ...]:
        hidden, head_dim = config.hidden_size, head_dim_of(config)
        queries_per_kv = config.num_attention_heads // config.num_key_value_heads
        blocks = {"q_proj": queries_per_kv * head_dim, "k_proj": head_dim, "v_proj": head_dim}
        slots = [Slot(f"{prefix}{name}.weight", 0, block, hidden) for name, block in blocks.items()]
        slots.append(Slot(f"{prefix}o_proj.weight", 1, queries_per_kv * head_dim, hidden))
        if self.has(self.qkv_bias):
            slots += [Slot(f"{prefix}{name}.bias", 0, block, 1, is_bias=True) for name, block in blocks.items()]
        return tuple(slots)

    def _mlp_sites(self, layer: int, config: PretrainedConfig) -> list[Site]:
        slots = self._mlp_slots(self.layer_prefix(layer) + "mlp.", config)
        return [Site(f"layers.{layer}.mlp_neuron", "mlp", layer, config.intermediate_size, slots)]

    def _mlp_slots(self, prefix: str, config: PretrainedConfig) -> tuple[Slot, ...]:
        hidden = config.hidden_size
        slots = [Slot(f"{prefix}{name}.weight", 0, 1, hidden) for name in ("gate_proj", "up_proj")]
        slots.append(Slot(f"{prefix}down_proj.weight", 1, 1, hidden))
        if self.has(self.mlp_bias):
            slots += [Slot(f"{prefix}{name}.bias", 0, 1, 1, is_bias=True) for name in ("gate_proj", "up_proj")]
        return tuple(slots)

    # -- sizes ---------------------------------------------------------------------------------------------------

    def layer_overrides(self, layer: int, kept_units: Mapping[str, int]) -> dict[str, int]:
        """Return the configuration values of one layer that keeps that many units at each of its sites."""
        config = self.config.per_layer_config[layer]
        kept_groups = kept_units[f"layers.{layer}.kv_group"]
        return {
            "num_attention_heads": kept_groups * (config.num_attention_heads // config.num_key_value_heads),
            "num_key_value_heads": kept_groups,
            **self._mlp_overrides(layer, kept_units),
        }

    def _mlp_overrides(self, layer: int, kept_units: Mapping[str, int]) -> dict[str, int]:
        return {"intermediate_size": kept_units[f"layers.{layer}.mlp_neuron"]}

    def stock_overrides(self, keep: Keep) -> dict[str, Any] | None:
        """Return the values that all layers share; None where they differ."""
        kept_units = {name: len(indices) for name, indices in keep.items()}
        shared: dict[str, Any] = {"head_dim": head_dim_of(self.config)}
        for layer in range(self.num_layers):
            for key, value in self.layer_overrides(layer, kept_units).items():
                if shared.setdefault(key, value) != value:
                    return None
        return shared

    def pruned_overrides(self, kept_units: Mapping[str, int]) -> dict[str, Any]:
        """Return the sizes layer by layer, beside the dense ones."""
        digits = len(str(self.num_layers - 1))
        return {
            "head_dim": head_dim_of(self.config),
            # Tools that read the global values get the dense ones: an upper bound for every layer.
            "allow_global_per_layer_attribute_access": True,
            "per_layer_config": {
                str(layer).zfill(digits): self.layer_overrides(layer, kept_units) for layer in range(self.num_layers)
            },
        }

    # -- walk ----------------------------------------------------------------------------------------------------

    def _build_skeleton(self) -> Any:
        return AutoModelForCausalLM.from_config(self.config)

    def layer_module(self, layer: int, kept_units: Mapping[str, int] | None = None) -> nn.Module:
        """Return the module of one layer; some families read their sizes from its configuration."""
        dense = self.skeleton.model.layers[layer]
        if kept_units is None:
            return dense
        config = copy.copy(self.config.per_layer_config[layer])
        config.head_dim = head_dim_of(self.config)
        for key, value in self.layer_overrides(layer, kept_units).items():
            setattr(config, key, value)
        with torch.device("meta"):
            return type(dense)(config, layer).eval()

    @property
    def norm_module(self) -> nn.Module:
        """The normalisation between the last layer and the head."""
        return self.skeleton.model.norm

    def attention_kinds(self) -> list[str]:
        """Return `full_attention` or `sliding_attention` for each layer."""
        if self.attention == "by_layer":
            return list(self.config.layer_types)
        sliding = self.attention == "window" and self.config.sliding_window is not None
        return ["sliding_attention" if sliding else "full_attention"] * self.num_layers

    def _position_embeddings(self, rotary: nn.Module, hidden: torch.Tensor, positions: torch.Tensor, kind: str) -> Any:
        return rotary(hidden, positions)

    def _layer_arguments(self, streams: Streams) -> list[dict[str, Any]]:
        (hidden,) = streams
        # A new one, with values: its frequencies are computed, not loaded, and some kinds (dynamic, longrope) change
        # them by what they have seen. Here every length is computed as on a text of its own.
        rotary = type(self.skeleton.model.rotary_emb)(config=self.config).to(hidden.device)
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        kinds = self.attention_kinds()
        by_kind = {
            kind: {
                "attention_mask": _MASKS[kind](
                    config=self.config,
                    inputs_embeds=hidden,
                    attention_mask=None,
                    past_key_values=None,
                    position_ids=positions,
                ),
                "position_embeddings": self._position_embeddings(rotary, hidden, positions, kind),
                "position_ids": positions,
            }
            for kind in sorted(set(kinds))
        }
        return [by_kind[kind] for kind in kinds]
