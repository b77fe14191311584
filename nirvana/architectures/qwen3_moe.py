"""Qwen3-MoE: neurons live inside experts. The module runs one fused tensor, which a checkpoint stores expert by expert.

Or as it is, where it was saved with `save_original_format=False`: both are read, the first is written.
All experts of a layer therefore keep equally many neurons; which ones is each expert's own matter.
"""

import re
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from nirvana.architectures.architecture import Keep, Parameters
from nirvana.architectures.decoder import DecoderArchitecture
from nirvana.architectures.site import Site
from nirvana.errors import InputError


class Qwen3Moe(DecoderArchitecture):
    """The common layout in attention; experts, or in some layers one common MLP, behind it."""

    model_type = "qwen3_moe"
    attention = "window"
    qkv_bias = "attention_bias"

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        if not 0 <= config.num_experts_per_tok <= config.num_experts or config.decoder_sparse_step < 1:
            raise InputError(
                f"config.json: expected num_experts_per_tok of at most num_experts ({config.num_experts}) and "
                f"decoder_sparse_step of at least 1, got {config.num_experts_per_tok} and "
                f"{config.decoder_sparse_step}; fetch the model again"
            )

    def experts(self) -> tuple[int, int]:
        """Return the configuration's counts."""
        return max(1, self.config.num_experts), max(1, self.config.num_experts_per_tok)

    def fused_parameters(self, layer: int) -> list[str]:
        """Return every expert's matrices."""
        return [name for name in self.layer_parameters(layer) if ".mlp.experts." in name]

    def fused_place(self, name: str) -> tuple[str, tuple[int | slice, ...], tuple[int, ...]] | None:
        """Return where one expert's matrix is in the layer's fused tensor: gate above up."""
        match = re.fullmatch(r"(.+\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight", name)
        if match is None:
            return None
        fused, expert, matrix = match[1], int(match[2]), match[3]
        shape, experts = self.parameter_shapes[name], self.config.num_experts
        if matrix == "down":
            return f"{fused}down_proj", (expert,), (experts, *shape)
        rows = shape[0]
        part = slice(0, rows) if matrix == "gate" else slice(rows, 2 * rows)
        return f"{fused}gate_up_proj", (expert, part), (experts, 2 * rows, shape[1])

    def _has_experts(self, layer: int) -> bool:
        config = self.config
        periodic = config.num_experts > 0 and (layer + 1) % config.decoder_sparse_step == 0
        return periodic and layer not in config.mlp_only_layers

    def layer_kind(self, layer: int) -> Hashable:
        """Return the kind of attention, and whether there are experts."""
        return super().layer_kind(layer), self._has_experts(layer)

    def _experts(self, layer: int) -> list[str]:
        return [f"{self.layer_prefix(layer)}mlp.experts.{expert}." for expert in range(self.config.num_experts)]

    def _mlp_sites(self, layer: int, config: PretrainedConfig) -> list[Site]:
        if not self._has_experts(layer):
            return super()._mlp_sites(layer, config)
        key, units = f"layers.{layer}.mlp_neuron", config.moe_intermediate_size
        return [
            Site(f"layers.{layer}.experts.{e}.mlp_neuron", "mlp", layer, units, self._mlp_slots(prefix, config), key)
            for e, prefix in enumerate(self._experts(layer))
        ]

    def _mlp_overrides(self, layer: int, kept_units: Mapping[str, int]) -> dict[str, int]:
        if not self._has_experts(layer):
            return super()._mlp_overrides(layer, kept_units)
        return {"moe_intermediate_size": kept_units[f"layers.{layer}.experts.0.mlp_neuron"]}

    def stock_overrides(self, keep: Keep) -> dict[str, Any] | None:
        """Return the values that all layers share; None where the stock class could not run them (see below)."""
        shared = super().stock_overrides(keep)
        return None if shared is None or shared.get("moe_intermediate_size", 0) % 8 else shared

    def layer_module(self, layer: int, kept_units: Mapping[str, int] | None = None) -> nn.Module:
        """Return the module of one layer; the grouped product takes rows of whole 16 bytes only."""
        module = super().layer_module(layer, kept_units)
        if kept_units is not None and any(units % 4 for units in self._mlp_overrides(layer, kept_units).values()):
            for part in module.modules():
                config: Any = getattr(part, "config", None)
                if config is not None:
                    config._experts_implementation = "eager"
        return module

    def _parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super()._parameter_shapes()
        for layer in filter(self._has_experts, range(self.num_layers)):
            fused = f"{self.layer_prefix(layer)}mlp.experts."
            _, both, hidden = shapes.pop(f"{fused}gate_up_proj")
            del shapes[f"{fused}down_proj"]
            for expert in self._experts(layer):
                shapes |= {f"{expert}{name}.weight": (both // 2, hidden) for name in ("gate_proj", "up_proj")}
                shapes[f"{expert}down_proj.weight"] = (hidden, both // 2)
        return shapes

    def fuse(self, layer: int, weights: Parameters) -> Parameters:
        """Stack the experts' matrices, gate above up."""
        if not self._has_experts(layer):
            return weights
        experts, fused = self._experts(layer), f"{self.layer_prefix(layer)}mlp.experts."
        gates, ups, downs = (
            torch.stack([weights[f"{expert}{name}.weight"] for expert in experts])
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        others = {name: weight for name, weight in weights.items() if not name.startswith(fused)}
        return others | {f"{fused}gate_up_proj": torch.cat([gates, ups], dim=1), f"{fused}down_proj": downs}


FAMILY = Qwen3Moe
