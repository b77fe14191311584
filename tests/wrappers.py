"""Tiny random models of text and pictures around a language model of a family that is described here."""

from pathlib import Path

from tiny import _common

_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "image_size": 16,
    "patch_size": 8,
}
_MROPE = {"type": "mrope", "mrope_section": [1, 1, 2]}


def wrapper_configs() -> dict[str, dict]:
    """Return the contents of config.json of a tiny model for each wrapper whose text part is taken out."""

    def text(**values):
        return {key: value for key, value in _common().items() if key != "pad_token_id"} | values

    gemma = text(
        model_type="gemma3_text",
        head_dim=16,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=16,
        rope_scaling={"factor": 8.0, "rope_type": "linear"},
    )
    pixtral = _SIGLIP | {"model_type": "pixtral", "head_dim": 8}
    clip = _SIGLIP | {"model_type": "clip_vision_model"}
    mistral = text(model_type="mistral", head_dim=8, sliding_window=None)
    qwen_vl = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
    qwen_vl |= {"out_hidden_size": 32, "fullatt_block_indexes": [0], "window_size": 8}
    qwen2_vl = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    qwen3_vl = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
    qwen3_vl |= {"out_hidden_size": 32, "deepstack_visual_indexes": [0]}
    llama = text(model_type="llama")
    return {
        "gemma3": {"text_config": gemma, "vision_config": _SIGLIP, "mm_tokens_per_image": 4},
        "mistral3": {"text_config": mistral, "vision_config": pixtral},
        "qwen2_5_vl": {
            "text_config": text(rope_scaling=_MROPE, model_type="qwen2_5_vl_text"),
            "vision_config": qwen_vl,
        },
        "qwen2_vl": {"text_config": text(rope_scaling=_MROPE, model_type="qwen2_vl_text"), "vision_config": qwen2_vl},
        "qwen3_vl": {
            "text_config": text(
                model_type="qwen3_vl_text",
                head_dim=16,
                rope_scaling={"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True},
            ),
            "vision_config": qwen3_vl,
        },
        "llava": {"text_config": llama, "vision_config": clip},
        "llava_next": {"text_config": mistral, "vision_config": clip},
        "llava_onevision": {"text_config": text(model_type="qwen2"), "vision_config": _SIGLIP},
        "internvl": {
            "text_config": text(model_type="qwen2"),
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
                "image_size": [16, 16],
                "patch_size": [8, 8],
            },
        },
        "idefics3": {
            "text_config": llama,
            "vision_config": _SIGLIP | {"model_type": "idefics3_vision"},
            "pad_token_id": None,
        },
        "smolvlm": {
            "text_config": llama,
            "vision_config": _SIGLIP | {"model_type": "smolvlm_vision"},
            "pad_token_id": None,
        },
    }


def save_wrapper(name: str, path: Path, seed: int = 0, shard_size: str = "5GB", **changes: object) -> Path:
    """Save a random wrapper of `wrapper_configs()`, norms not trivial, and return `path`."""
    import copy

    import torch
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    torch.manual_seed(seed)
    values = copy.deepcopy(wrapper_configs()[name]) | changes
    model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[name](**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    model.save_pretrained(path, max_shard_size=shard_size)
    return path
