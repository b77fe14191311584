"""Mistral: Llama's layout without biases; one sliding window for all layers, or none."""

from nirvana.architectures.decoder import DecoderArchitecture


class Mistral(DecoderArchitecture):
    """The common layout."""

    model_type = "mistral"
    attention = "window"
    gguf_layout = True


FAMILY = Mistral
