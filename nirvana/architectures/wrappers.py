"""Models around a language model of a family that is described here: for pictures, films or sound.

What reads text in them is a plain model of the family: with text alone, each of these classes gives the logits that the
family's class gives, bit for bit (tests/nirvana/test_wrappers.py compares them). Their text part can therefore be
taken out and pruned; the rest stays behind.
"""

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

COMPARED = frozenset(
    {
        "gemma3",
        "idefics3",
        "internvl",
        "llava",
        "llava_next",
        "llava_onevision",
        "mistral3",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3_vl",
        "smolvlm",
    }
)
"""`model_type` of the wrappers whose text part was compared with the family's own class."""
_SAME_AS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
# positions in time, height and width: one and the same where all there is is text
_OF_PICTURES = ("mrope_section", "mrope_interleaved", "type")
_OF_THE_WHOLE = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype")


def text_family(config: PretrainedConfig) -> str | None:
    """Return the `model_type` of the plain model inside a wrapper; None if the configuration is no wrapper's."""
    inner = getattr(config, "text_config", None)
    if not isinstance(inner, PretrainedConfig):
        return None
    return _SAME_AS.get(inner.model_type, inner.model_type)


def text_config(config: PretrainedConfig, given: dict[str, Any], own_head: bool) -> PretrainedConfig:
    """Return the configuration of the plain model inside a wrapper, defaults filled in as transformers does.

    Args:
        config: The wrapper's.
        given: What its config.json says, for what stands at the wrapper rather than in its text part.
        own_head: Whether the files have an output head apart from the embedding.
    """
    family = text_family(config)
    assert family is not None
    values = config.text_config.to_dict()
    rope = values.get("rope_parameters")
    if isinstance(rope, dict):
        values["rope_parameters"] = {key: value for key, value in rope.items() if key not in _OF_PICTURES}
    said = given.get("text_config") or {}
    for key in _OF_THE_WHOLE:
        if said.get(key) is None and given.get(key, given.get(f"torch_{key}")) is not None:
            values[key] = given.get(key, given.get(f"torch_{key}"))
    values |= {
        "model_type": family,
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]],
        "tie_word_embeddings": not own_head,
    }
    return CONFIG_MAPPING[family].from_dict(values)
