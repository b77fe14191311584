"""What the decoder-only families share: grouped-query attention, a gated MLP, and the walk over both."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from nirvana.architectures.site import Site, Slot

_MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


@dataclass(frozen=True)
class DecoderFamily:
    """How one family deviates from the common decoder layout.

    The layout: `model.embed_tokens`, `model.layers.N.self_attn.{q,k,v,o}_proj`,
    `model.layers.N.mlp.{gate,up,down}_proj`, `model.norm`, `lm_head` (absent when tied).
    """

    model_type: str
    """`model_type` of the family's stock configuration."""
    qkv_bias: bool | str
    """Whether q, k and v carry biases, or the configuration key that says so."""
    mlp_bias: bool | str
    """Whether gate and up carry biases, or the configuration key that says so."""
    attention_kinds: Any
    """Function of the configuration: one of `full_attention`, `sliding_attention` for each layer."""


def head_dim_of(config: PretrainedConfig) -> int:
    """Return the head dimension: explicit where the configuration has it (Qwen3: not hidden / heads)."""
    explicit = getattr(config, "head_dim", None)
    return explicit if explicit is not None else config.hidden_size // config.num_attention_heads


def _has(config: PretrainedConfig, flag: bool | str) -> bool:
    return bool(getattr(config, flag, False)) if isinstance(flag, str) else flag


class DecoderArchitecture:
    """Sites and walk of a decoder-only causal language model."""

    embedding_parameter = "model.embed_tokens.weight"
    norm_prefix = "model.norm."
    own_head_parameter = "lm_head.weight"
    """Name of the output head's weight where it is not the embedding's."""

    def __init__(self, family: DecoderFamily, config: PretrainedConfig):
        self.family = family
        # The walk passes no mask where it can: only sdpa then remains causal.
        self.config = copy.deepcopy(config)
        self.config._attn_implementation = "sdpa"
        self._skeleton: Any = None
        self._rotary: Any = None

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.config.num_hidden_layers

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""
        return self.config.vocab_size

    def layer_prefix(self, layer: int) -> str:
        """Return what all parameter names of a layer begin with."""
        return f"model.layers.{layer}."

    # -- sites ---------------------------------------------------------------------------------------------------

    def sites(self) -> tuple[Site, ...]:
        """Return the KV-group and MLP-neuron site of every layer, in walk order."""
        result: list[Site] = []
        for layer in range(self.num_layers):
            config = self.config.per_layer_config[layer]
            result += [self._attention_site(layer, config), self._mlp_site(layer, config)]
        return tuple(result)

    def _attention_site(self, layer: int, config: PretrainedConfig) -> Site:
        prefix, hidden, head_dim = self.layer_prefix(layer) + "self_attn.", config.hidden_size, head_dim_of(config)
        queries_per_kv = config.num_attention_heads // config.num_key_value_heads
        blocks = {"q_proj": queries_per_kv * head_dim, "k_proj": head_dim, "v_proj": head_dim}
        slots = [Slot(f"{prefix}{name}.weight", 0, block, hidden) for name, block in blocks.items()]
        slots.append(Slot(f"{prefix}o_proj.weight", 1, queries_per_kv * head_dim, hidden))
        if _has(config, self.family.qkv_bias):
            slots += [Slot(f"{prefix}{name}.bias", 0, block, 1, is_bias=True) for name, block in blocks.items()]
        return Site(f"layers.{layer}.kv_group", "attention", layer, config.num_key_value_heads, tuple(slots))

    def _mlp_site(self, layer: int, config: PretrainedConfig) -> Site:
        prefix, hidden = self.layer_prefix(layer) + "mlp.", config.hidden_size
        slots = [Slot(f"{prefix}{name}.weight", 0, 1, hidden) for name in ("gate_proj", "up_proj")]
        slots.append(Slot(f"{prefix}down_proj.weight", 1, 1, hidden))
        if _has(config, self.family.mlp_bias):
            slots += [Slot(f"{prefix}{name}.bias", 0, 1, 1, is_bias=True) for name in ("gate_proj", "up_proj")]
        return Site(f"layers.{layer}.mlp_neuron", "mlp", layer, config.intermediate_size, tuple(slots))

    def layer_overrides(self, layer: int, kept_units: Mapping[str, int]) -> dict[str, int]:
        """Return the configuration values of one layer that keeps the given number of units at each of its sites."""
        config = self.config.per_layer_config[layer]
        kept_groups = kept_units[f"layers.{layer}.kv_group"]
        return {
            "num_attention_heads": kept_groups * (config.num_attention_heads // config.num_key_value_heads),
            "num_key_value_heads": kept_groups,
            "intermediate_size": kept_units[f"layers.{layer}.mlp_neuron"],
        }

    def explicit_values(self) -> dict[str, int]:
        """Return configuration values that a stock class would otherwise derive from counts that pruning changes."""
        return {"head_dim": head_dim_of(self.config)}

    # -- walk ----------------------------------------------------------------------------------------------------

    @property
    def skeleton(self) -> Any:
        """The model without weights (meta device): its modules hold the code of each step of the walk."""
        if self._skeleton is None:
            with torch.device("meta"):
                self._skeleton = AutoModelForCausalLM.from_config(self.config).eval()
        return self._skeleton

    def _rotary_on(self, device: torch.device) -> nn.Module:
        """Return the rotary embedding with values: its frequencies are computed, not loaded."""
        if self._rotary is None:
            self._rotary = type(self.skeleton.model.rotary_emb)(config=self.config)
        return self._rotary.to(device)

    def layer_module(self, layer: int) -> nn.Module:
        """Return the module of one layer; its parameters are on the meta device."""
        return self.skeleton.model.layers[layer]

    @property
    def norm_module(self) -> nn.Module:
        """The normalisation between the last layer and the head."""
        return self.skeleton.model.norm

    def embed(self, table: Float[Tensor, "vocab hidden"], ids: Int[Tensor, "batch tokens"]) -> Tensor:
        """Return the hidden states that enter layer 0."""
        return nn.functional.embedding(ids, table)

    def layer_arguments(self, hidden: Float[Tensor, "batch tokens hidden"]) -> list[dict[str, Any]]:
        """Return what each layer's forward needs besides hidden states, for sequences that start at position 0."""
        rotary_module = self._rotary_on(hidden.device)
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        rotary = rotary_module(hidden, positions)
        kinds = self.family.attention_kinds(self.config)
        masks = {
            kind: _MASKS[kind](
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=None,
                past_key_values=None,
                position_ids=positions,
            )
            for kind in sorted(set(kinds))
        }
        return [
            {"attention_mask": masks[kind], "position_embeddings": rotary, "position_ids": positions} for kind in kinds
        ]
