"""T5 and T5-v1.1: an encoder and a decoder, a relative position bias that the layers of a stack share.

The streams are (encoder, decoder). The decoder's layers read the encoder's stream beside their own; the encoder's last
layer includes the norm that follows it. Every self-attention keeps its own heads, so a pruned checkpoint gives each its
own slice of the stack's bias table; a stock T5 has one table a stack and needs the same heads in all of its layers.
"""

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForSeq2SeqLM, PretrainedConfig

from nirvana.architectures.architecture import Architecture, Keep, Parameters, Streams
from nirvana.architectures.site import Site, Slot
from nirvana.checkpoint.modeling_nirvana import pruned_t5_block

_TABLE = "layer.0.SelfAttention.relative_attention_bias.weight"
_ENCODER_NORM = "encoder.final_layer_norm.weight"


class T5(Architecture):
    """Units: heads of encoder self-, decoder self- and cross-attention, and neurons of the feed-forward layers."""

    model_type = "t5"
    is_encoder_decoder = True
    embedding_parameter = "shared.weight"
    norm_prefix = "decoder.final_layer_norm."

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        if config.scale_decoder_outputs:
            self.output_scale = config.d_model**-0.5
        self._feed_forward = ("wi_0", "wi_1") if config.is_gated_act else ("wi",)

    @property
    def num_layers(self) -> int:
        """Layers of the encoder, then those of the decoder."""
        return self.config.num_layers + self.config.num_decoder_layers

    @property
    def hidden_size(self) -> int:
        """Width of both residual streams."""
        return self.config.d_model

    def _place(self, layer: int) -> tuple[str, int]:
        """Return a layer's stack and its index there."""
        encoder = self.config.num_layers
        return ("encoder", layer) if layer < encoder else ("decoder", layer - encoder)

    def layer_prefix(self, layer: int) -> str:
        """Return what the parameter names of a layer's block begin with."""
        stack, index = self._place(layer)
        return f"{stack}.block.{index}."

    def layer_parameters(self, layer: int) -> list[str]:
        """Return the block's parameters, its bias table and, for the encoder's last, the norm that follows."""
        names = {*super().layer_parameters(layer), self.layer_prefix(layer) + _TABLE}
        if layer == self.config.num_layers - 1:
            names.add(_ENCODER_NORM)
        return sorted(names)

    def _parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super()._parameter_shapes()
        # embeddings that some checkpoints repeat under other names
        return {name: shape for name, shape in shapes.items() if not name.endswith("embed_tokens.weight")}

    def stored_name(self, name: str) -> str:
        """Return the stack's one bias table for that of any of its layers."""
        if not name.endswith(_TABLE):
            return name
        return f"{name.split('.', 1)[0]}.block.0.{_TABLE}"

    def derived_parameters(self) -> list[str]:
        """Return the bias table of every layer."""
        return [self.layer_prefix(layer) + _TABLE for layer in range(self.num_layers)]

    def layer_kind(self, layer: int) -> Hashable:
        """Return the stack, whether it is its first, which makes the position bias, and the encoder's last."""
        stack, index = self._place(layer)
        return stack, index == 0, self.ends_in_addition(layer)

    def class_layers(self, model: Any) -> list[tuple[nn.Module, nn.Module]]:
        """Return each block, with the norm that follows it where that belongs to the layer."""
        blocks = [*model.encoder.block, *model.decoder.block]
        last = self.config.num_layers - 1
        return [(b, model.encoder.final_layer_norm if i == last else b) for i, b in enumerate(blocks)]

    # -- sites and sizes -----------------------------------------------------------------------------------------

    def _sizes(self, layer: int) -> dict[str, int]:
        """Return the dense model's (or a pruned one's) sizes of a layer."""
        stack, index = self._place(layer)
        pruned = getattr(self.config, "pruned_layers", None)
        if pruned is not None:
            return dict(pruned[stack][index])
        sizes = {"num_heads": self.config.num_heads, "d_ff": self.config.d_ff}
        return sizes | ({"cross_num_heads": self.config.num_heads} if stack == "decoder" else {})

    def sites(self) -> tuple[Site, ...]:
        """Return the attention and feed-forward sites of every layer, encoder first."""
        result = []
        for layer in range(self.num_layers):
            stack, index = self._place(layer)
            prefix, name, sizes = self.layer_prefix(layer), f"{stack}.{index}", self._sizes(layer)
            hidden, block = self.config.d_model, self.config.d_kv
            table = Slot(prefix + _TABLE, 1, 1, 1, is_bias=True, stored_as=self.stored_name(prefix + _TABLE))
            heads = (*_head_slots(f"{prefix}layer.0.SelfAttention.", block, hidden), table)
            result.append(
                Site(f"{name}.self_attention", "attention", layer, sizes["num_heads"], heads, aligned_with=stack)
            )
            if stack == "decoder":
                heads = _head_slots(f"{prefix}layer.1.EncDecAttention.", block, hidden)
                result.append(Site(f"{name}.cross_attention", "attention", layer, sizes["cross_num_heads"], heads))
            dense = f"{prefix}layer.{2 if stack == 'decoder' else 1}.DenseReluDense."
            slots = [Slot(f"{dense}{matrix}.weight", 0, 1, hidden) for matrix in self._feed_forward]
            slots.append(Slot(f"{dense}wo.weight", 1, 1, hidden))
            result.append(Site(f"{name}.mlp_neuron", "mlp", layer, sizes["d_ff"], tuple(slots)))
        return tuple(result)

    def layer_overrides(self, layer: int, kept_units: Mapping[str, int]) -> dict[str, int]:
        """Return the sizes of one layer that keeps that many units at each of its sites."""
        stack, index = self._place(layer)
        sizes = {
            "num_heads": kept_units[f"{stack}.{index}.self_attention"],
            "d_ff": kept_units[f"{stack}.{index}.mlp_neuron"],
        }
        if stack == "decoder":
            sizes["cross_num_heads"] = kept_units[f"{stack}.{index}.cross_attention"]
        return sizes

    def stock_overrides(self, keep: Keep) -> dict[str, Any] | None:
        """Return the one head and neuron count; None if they differ or a stack's layers keep different heads."""
        kept_units = {name: len(indices) for name, indices in keep.items()}
        layers = [self.layer_overrides(layer, kept_units) for layer in range(self.num_layers)]
        heads = {count for sizes in layers for key, count in sizes.items() if key != "d_ff"}
        neurons = {sizes["d_ff"] for sizes in layers}
        shared = {
            site.aligned_with: tuple(keep[site.name].tolist()) for site in self.sites() if site.aligned_with is not None
        }
        aligned = all(
            tuple(keep[site.name].tolist()) == shared[site.aligned_with] for site in self.sites() if site.aligned_with
        )
        # a pruned model may have lost the heads that its layers would have to share
        dense = getattr(self.config, "pruned_layers", None) is None
        if len(heads) > 1 or len(neurons) > 1 or not aligned or not dense:
            return None
        return {"num_heads": heads.pop(), "d_ff": neurons.pop(), **self._output_values()}

    def _output_values(self) -> dict[str, Any]:
        # `tie_word_embeddings` is read as "scale the outputs" by T5's configuration, whatever it wrote itself
        return {"tie_word_embeddings": bool(self.config.scale_decoder_outputs)}

    def pruned_overrides(self, kept_units: Mapping[str, int]) -> dict[str, Any]:
        """Return the sizes of every layer, a list a stack."""
        layers: dict[str, list[dict[str, int]]] = {"encoder": [], "decoder": []}
        for layer in range(self.num_layers):
            layers[self._place(layer)[0]].append(self.layer_overrides(layer, kept_units))
        return {"pruned_layers": layers, **self._output_values()}

    # -- walk ----------------------------------------------------------------------------------------------------

    def written_stream(self, layer: int) -> int:
        """Return 0 for a layer of the encoder, 1 for one of the decoder."""
        return int(layer >= self.config.num_layers)

    def ends_in_addition(self, layer: int) -> bool:
        """Tell that the encoder's last layer here ends in the encoder's norm."""
        return layer != self.config.num_layers - 1

    def _build_skeleton(self) -> Any:
        return AutoModelForSeq2SeqLM.from_config(self.config)

    def layer_module(self, layer: int, kept_units: Mapping[str, int] | None = None) -> nn.Module:
        """Return a block that has a bias table of its own."""
        stack, index = self._place(layer)
        sizes = self._sizes(layer) if kept_units is None else self.layer_overrides(layer, kept_units)
        config = getattr(self.skeleton, stack).config
        with torch.device("meta"):
            block = pruned_t5_block(config, index, sizes["num_heads"], sizes.get("cross_num_heads"), sizes["d_ff"])
        return block.eval()

    @property
    def norm_module(self) -> nn.Module:
        """The normalisation between the decoder's last layer and the head."""
        return self.skeleton.decoder.final_layer_norm

    def _layer_arguments(self, streams: Streams) -> list[dict[str, Any]]:
        # no padding: the encoder sees everything, and attention without a mask is causal in the decoder
        return [{} for _ in range(self.num_layers)]

    def run_layer(
        self, layer: int, streams: Streams, arguments: Mapping[str, Any], weights: Parameters, module: nn.Module
    ) -> Streams:
        """Return both streams; a layer changes one of them."""
        encoder, decoder = streams
        prefix = self.layer_prefix(layer)
        if self._place(layer)[0] == "decoder":
            reads = {**arguments, "encoder_hidden_states": encoder}
            return encoder, self._call(module, weights, prefix, decoder, reads)
        encoder = self._call(module, weights, prefix, encoder, arguments)
        if layer == self.config.num_layers - 1:
            norm = self.skeleton.encoder.final_layer_norm
            encoder = functional_call(norm, {"weight": weights[_ENCODER_NORM]}, (encoder,))
        return encoder, decoder


def _head_slots(prefix: str, block: int, hidden: int) -> tuple[Slot, ...]:
    rows = tuple(Slot(f"{prefix}{name}.weight", 0, block, hidden) for name in ("q", "k", "v"))
    return (*rows, Slot(f"{prefix}o.weight", 1, block, hidden))


FAMILY = T5
