"""Every switch of every family: the walk follows transformers' class, or the model is refused by the switch's name.

Which keys there are is read from the code of the installed transformers. Each must be in a table here: tried, or inert
with a reason. A release that reads a new key fails `test_every_key_is_known`.
"""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from naive import naive_saliency
from safetensors.torch import load_file, save_file
from tiny import family_configs, ids_for, masked_dense, pruned_checkpoint, random_ids, t5_configs
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, T5ForConditionalGeneration
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nirvana.architectures.registry import FAMILIES, architecture_for
from nirvana.conformance import check_walk
from nirvana.errors import InputError
from nirvana.saliency import channel_key, channel_saliency
from nirvana.switches import keys_read
from nirvana.walk import Stack

FULL, SLIDING = "full_attention", "sliding_attention"
DECODERS = sorted(set(FAMILIES) - {"t5"})
BY_LAYER = {"qwen2", "qwen3", "gemma3_text"}
WINDOWED = {"mistral", "phi3", "qwen2", "qwen3", "qwen3_moe", "gemma3_text"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A family with a switch thrown."""

    family: str
    switch: str
    values: dict
    """What config.json says."""
    refused: str | None = None
    """What the refusal names; None where the class is followed."""
    deep: bool = False
    """Whether saliency and generation are compared as well: where a switch reaches into attention or units."""
    own_head: bool = False
    """Whether a head that differs from the embedding is stored."""

    cut: bool = True
    """Whether the pruned class is compared too: not where it runs the very code of the stock class."""

    def __str__(self) -> str:
        return f"{self.family}-{self.switch}"


# -- which switches --------------------------------------------------------------------------------------------------

THETA = 500000.0
ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 30, "attention_factor": 1.3},
    "proportional": {"factor": 2.0},
}
YARN = {
    "attention_factor": {"attention_factor": 1.7},
    "beta": {"beta_fast": 3.0, "beta_slow": 0.5},
    "mscale": {"mscale": 1.5, "mscale_all_dim": 0.7},
    "truncate": {"truncate": False},
}


def rotated(family):
    """Return how many frequencies a head has."""
    return {"qwen3": 8, "qwen3_moe": 8, "gemma3_text": 8}.get(family, 4)


def ropes(family):
    """Yield a case for each kind of rotary embedding in each spelling."""
    for kind, settings in ROPES.items():
        if kind == "longrope":
            factors = np.linspace(1.0, 2.0, rotated(family)).tolist()
            settings = settings | {"short_factor": factors, "long_factor": factors[::-1]}
        values = {"rope_type": kind, **settings}
        # Phi-3's configuration knows two kinds, and takes yarn for the second
        refused = "rope" if family == "phi3" and kind not in ("default", "longrope") else None
        new = values | {"rope_theta": THETA}
        if family == "phi3" and kind == "longrope":
            new |= {"partial_rotary_factor": 1.0}
        spelled = {FULL: new, SLIDING: {"rope_type": "default", "rope_theta": 77.0}}
        both = {
            "rope_parameters": {"rope_parameters": spelled if family == "gemma3_text" else new},
            "rope_scaling": {"rope_theta": THETA, "rope_scaling": values if kind != "default" else None},
        }
        for spelling, written in both.items():
            extra = {"max_position_embeddings": 40}
            if family == "phi3":
                extra["original_max_position_embeddings"] = 30
            yield Case(family, f"{spelling}.{kind}", written | extra, refused, cut=spelling == "rope_parameters")
    if family != "phi3":
        for name, settings in YARN.items():
            values = {"rope_type": "yarn", "rope_theta": THETA, **ROPES["yarn"], **settings}
            spelled = {FULL: values, SLIDING: values} if family == "gemma3_text" else values
            yield Case(family, f"yarn.{name}", {"rope_parameters": spelled}, cut=family == "gemma3_text")


def decoder_cases(family):
    """Yield the cases of a decoder-only family."""
    activation = "hidden_activation" if family == "gemma3_text" else "hidden_act"
    yield from ropes(family)
    for value in ("gelu_pytorch_tanh", "relu"):
        yield Case(family, f"{activation}.{value}", {activation: value}, deep=value == "relu")
    for name, value in {"head_dim": 24, "num_key_value_heads": 4, "rms_norm_eps": 0.5, "num_hidden_layers": 1}.items():
        sizes = {"layer_types": [FULL]} if name == "num_hidden_layers" and family in BY_LAYER else {}
        yield Case(family, name, {name: value, **sizes}, cut=name in ("head_dim", "num_key_value_heads"))
    for name, value in {
        "vocab_size": 530,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_attention_heads": 8,
    }.items():
        yield Case(family, name, {name: value}, cut=False)
    yield Case(family, "tie_word_embeddings.true", {"tie_word_embeddings": True}, deep=True)
    yield Case(family, "tie_word_embeddings.false", {"tie_word_embeddings": False}, deep=True)
    yield Case(family, "tie_word_embeddings.own_head", {"tie_word_embeddings": True}, own_head=True, deep=True)
    for value in (False, None):
        yield Case(family, f"is_causal.{value}", {"is_causal": value}, "is_causal")
    yield Case(family, "is_causal.True", {"is_causal": True}, cut=False)
    yield Case(family, "return_dict", {"return_dict": False}, "return_dict")
    yield Case(family, "is_encoder_decoder", {"is_encoder_decoder": True}, "is_encoder_decoder")
    yield Case(family, "per_layer_config", {"per_layer_config": {"0": {"intermediate_size": 24}}}, "per_layer_config")
    yield Case(family, "per_layer_config.empty", {"per_layer_config": {}}, cut=False)
    yield Case(family, "pruned_layers", {"pruned_layers": {"encoder": []}}, "pruned_layers")
    yield Case(family, "attention_dropout", {"attention_dropout": 0.5}, cut=False)
    yield Case(family, "pad_token_id", {"pad_token_id": 3}, cut=False)
    chunk = {"attention_chunk_size": 4} | ({} if family == "gemma3_text" else {"sliding_window": None} | full(family))
    yield Case(family, "attention_chunk_size", chunk, cut=False)
    yield Case(family, "use_cache", {"use_cache": False}, cut=False)
    yield Case(family, "is_decoder", {"is_decoder": True}, cut=False)
    yield Case(family, "output_hidden_states", {"output_hidden_states": True}, cut=False)
    yield from attention_cases(family)


def full(family):
    """Return what makes all layers of a family full."""
    return {"layer_types": [FULL] * 3} if family in BY_LAYER else {}


def attention_cases(family):
    """Yield the cases of windows and kinds of layers."""
    mixed = [SLIDING, FULL, SLIDING]
    chunked = {"layer_types": [FULL, "chunked_attention", FULL], "attention_chunk_size": 4, "sliding_window": None}
    if family == "mistral":  # transformers reads it as another family
        yield Case(family, "layer_types.mixed", {"layer_types": mixed, "sliding_window": 6}, "layer_types")
        yield Case(family, "layer_types.chunked", chunked, "layer_types")
    else:
        yield Case(family, "layer_types.chunked", chunked, "layer_types")
        switched = {"use_sliding_window": False} if family.startswith("qwen") else {}
        no_window = {"layer_types": mixed, "sliding_window": None, **switched}
        yield Case(family, "layer_types.no_window", no_window, "layer_types")
        on = {"layer_types": mixed, "sliding_window": 6} | ({"use_sliding_window": True} if switched else {})
        # two kinds where the class runs one and its cache the other
        yield Case(family, "layer_types.mixed", on, "layer_types" if family in ("phi3", "qwen3_moe") else None, True)
        if switched:
            off = {"layer_types": mixed, "sliding_window": 6, "use_sliding_window": False}
            yield Case(family, "layer_types.mixed_off", off, "layer_types")
    if family in WINDOWED:
        switch = {"use_sliding_window": True} if family.startswith("qwen") else {}
        yield Case(family, "sliding_window.6", {"sliding_window": 6, **switch}, deep=True)
        yield Case(family, "sliding_window.1", {"sliding_window": 1, **switch})
        off = {"use_sliding_window": False} if switch else full(family)
        # Gemma's class makes both masks in every forward
        refused = "sliding_window=None" if family == "gemma3_text" else None
        yield Case(family, "sliding_window.off", {"sliding_window": 6 if switch else None, **off}, refused)
        if switch:
            for first in (0, 1, 3):
                layers = {"sliding_window": 6, "max_window_layers": first, "use_sliding_window": True}
                yield Case(family, f"max_window_layers.{first}", layers)
    else:  # read by the cache alone: attention is full in every forward
        yield Case(family, "sliding_window", {"sliding_window": 4})


def family_cases():
    """Yield the cases that one family or a few have."""
    for family in ("llama", "qwen3", "qwen3_moe", "gemma3_text", "granite"):
        yield Case(family, "attention_bias", {"attention_bias": True}, deep=True)
    for family in ("llama", "granite"):
        yield Case(family, "mlp_bias", {"mlp_bias": True}, deep=True)
    phi = {"rope_type": "default", "rope_theta": THETA}
    yield Case("phi3", "partial_rotary_factor", {"partial_rotary_factor": 0.5}, deep=True)
    yield Case(
        "phi3", "rope_parameters.partial_rotary_factor", {"rope_parameters": phi | {"partial_rotary_factor": 0.5}}
    )
    yield Case("phi3", "resid_pdrop", {"resid_pdrop": 0.5})
    yield Case("phi3", "embd_pdrop", {"embd_pdrop": 0.5})
    for family in ("llama", "qwen2"):  # cos and sin of half a head, which the class cannot multiply by a whole one
        values = phi | {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}
        named = "'partial_rotary_factor': 0.5"
        yield Case(family, "rope_parameters.partial_rotary_factor", {"rope_parameters": values}, named)
    gemma = {
        "final_logit_softcapping": {"final_logit_softcapping": 2.0},
        "attn_logit_softcapping": {"attn_logit_softcapping": 2.0},
        "query_pre_attn_scalar": {"query_pre_attn_scalar": 3},
        "rope_local_base_freq": {"rope_local_base_freq": 77.0, "rope_parameters": None},
        "sliding_window_pattern": {"sliding_window_pattern": 2, "layer_types": None},
        "_sliding_window_pattern": {"_sliding_window_pattern": 2, "layer_types": None},
    }
    for switch, values in gemma.items():
        yield Case("gemma3_text", switch, values, deep=switch in ("query_pre_attn_scalar", "final_logit_softcapping"))
    both = {"use_bidirectional_attention": True}
    yield Case("gemma3_text", "use_bidirectional_attention", both, "use_bidirectional_attention")
    yield Case("gemma3_text", "use_bidirectional_attention.False", {"use_bidirectional_attention": False})
    for switch in ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"):
        yield Case("granite", switch, {switch: 0.3}, deep=True)
    moe = {
        "norm_topk_prob.False": {"norm_topk_prob": False},
        "norm_topk_prob.True": {"norm_topk_prob": True},
        "decoder_sparse_step.2": {"decoder_sparse_step": 2, "mlp_only_layers": []},
        "decoder_sparse_step.9": {"decoder_sparse_step": 9, "mlp_only_layers": []},
        "mlp_only_layers.none": {"mlp_only_layers": []},
        "mlp_only_layers.first": {"mlp_only_layers": [0]},
        "num_experts": {"num_experts": 6},
        "num_local_experts": {"num_local_experts": 6},
        "num_experts_per_tok.1": {"num_experts_per_tok": 1},
        "num_experts_per_tok.all": {"num_experts_per_tok": 4},
        "moe_intermediate_size": {"moe_intermediate_size": 40},
        "output_router_logits": {"output_router_logits": True},
        "router_aux_loss_coef": {"router_aux_loss_coef": 1.0},
    }
    for switch, values in moe.items():
        yield Case("qwen3_moe", switch, values, deep=switch in ("norm_topk_prob.False", "decoder_sparse_step.2"))


def t5_cases():
    """Yield the cases of T5."""
    for value in ("relu", "gated-gelu", "gelu", "gated-silu", "gated-relu", "silu"):
        yield Case("t5", f"feed_forward_proj.{value}", {"feed_forward_proj": value}, deep=value == "gated-silu")
    values = {
        "relative_attention_num_buckets": 4,
        "relative_attention_max_distance": 9,
        "num_decoder_layers": 1,
        "num_layers": 1,
        "num_heads": 2,
        "d_kv": 12,
        "d_ff": 40,
        "d_model": 48,
        "vocab_size": 530,
        "layer_norm_epsilon": 0.5,
        "dropout_rate": 0.5,
        "classifier_dropout": 0.5,
        "initializer_factor": 0.7,
        "is_decoder": True,
        "pad_token_id": 3,
        "decoder_start_token_id": 5,
        "tie_word_embeddings": True,
        "scale_decoder_outputs": False,
        "dense_act_fn": "gelu",
        "is_gated_act": True,
        "use_cache": False,
        "output_hidden_states": True,
        "attention_chunk_size": 4,
        "sliding_window": 4,
        "max_position_embeddings": 4,
        "per_layer_config": {},
    }
    deep = {"relative_attention_num_buckets", "relative_attention_max_distance", "num_decoder_layers"}
    for switch, value in values.items():
        yield Case("t5", switch, {switch: value}, deep=switch in deep)
    yield Case("t5", "num_decoder_layers.none", {"num_decoder_layers": None})
    yield Case("t5", "tie_word_embeddings.false", {"tie_word_embeddings": False}, own_head=True, deep=True)
    yield Case("t5", "tie_word_embeddings.own_head", {"tie_word_embeddings": True}, own_head=True)
    for switch, value in {"is_causal": False, "return_dict": False, "is_encoder_decoder": False}.items():
        yield Case("t5", switch, {switch: value}, switch)
    yield Case("t5", "pruned_layers", {"pruned_layers": {"encoder": []}}, "pruned_layers")
    yield Case("t5", "layer_types", {"layer_types": [FULL, FULL]}, "layer_types")


FAMILY_CASES = [*family_cases(), *t5_cases()]
CASES = [case for family in DECODERS for case in decoder_cases(family)] + FAMILY_CASES
INERT = {
    "_attn_implementation": "which kernel: the same numbers but for rounding",
    "default_theta": "a constant of the class, used where no rope_theta is",
    "initializer_range": "read when weights are drawn, which a checkpoint brings",
    "max_position_embeddings": "read by rotary kinds alone, whose cases set it",
    "original_max_position_embeddings": "as max_position_embeddings",
    "rope_parameters.type": "how rope_type was once spelled: written by phi3, read back in test_config",
    "rope_parameters.partial_rotary_factor": "families but phi3 rotate whole heads, their classes cannot run another",
}


# -- models ----------------------------------------------------------------------------------------------------------


def save(case, path):
    """Save a random model as transformers makes it of the configuration, with config.json as a user has it."""
    if case.family == "t5":
        base = t5_configs()["t5-relu-tied"].to_dict() | {"tie_word_embeddings": True}
        auto = T5ForConditionalGeneration._from_config
    else:
        base = family_configs()[case.family].to_dict() | {"max_position_embeddings": 64}
        auto = AutoModelForCausalLM.from_config
    base = {key: value for key, value in base.items() if not key.startswith("_") and key != "transformers_version"}
    if "rope_scaling" in case.values or "rope_theta" in case.values or "partial_rotary_factor" in case.values:
        base.pop("rope_parameters")
    if case.switch == "num_experts":
        base.pop("num_local_experts")
    if case.family == "t5":
        for key in {"dense_act_fn", "is_gated_act", "scale_decoder_outputs"} - set(case.values):
            base.pop(key, None)
    written = base | case.values
    torch.manual_seed(0)
    buildable = {key: value for key, value in written.items() if key not in ("per_layer_config", "return_dict")}
    if case.refused is not None:  # the weights do not matter
        buildable = base
    model = auto(CONFIG_MAPPING[case.family](**buildable)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif name.endswith((".q.weight", ".k.weight")):
                parameter.mul_(2)
    model.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(written | {"model_type": case.family}))
    if case.own_head:
        weights = load_file(path / "model.safetensors")
        shape = weights[architecture_for(model.config).embedding_parameter].shape
        weights["lm_head.weight"] = 0.3 * torch.randn(shape)
        save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


def unequal_keep(stack):
    """Keep three fifths of every site, and a number of neurons that differs by layer."""
    generator, keep = np.random.default_rng(0), {}
    for site in stack.architecture.sites():
        kept = max(1, round(0.6 * site.units) - (3 * (site.layer % 2) if site.module == "mlp" else 0))
        keep[site.name] = np.sort(generator.permutation(site.units)[:kept])
    return keep


# -- what is asked of each -------------------------------------------------------------------------------------------


def marked(case):
    """Leave to the slow run what a family computes with the very code that another one shows here."""
    shown_elsewhere = case.family in ("mistral", "granite", "qwen3") and case.refused is None
    own = case in FAMILY_CASES or case.switch.startswith(("layer_types", "sliding_window", "tie_word"))
    return pytest.param(case, marks=[pytest.mark.slow] if shown_elsewhere and not own else [], id=str(case))


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_a_switch_is_followed_or_refused_by_name(case, tmp_path):
    model = save(case, tmp_path / "dense")
    if case.refused is not None:
        with pytest.raises(InputError, match=re.escape(case.refused)) as caught:
            check_walk(model)
        assert "\n" not in str(caught.value)
        return
    assert check_walk(model).largest_difference <= 1e-5
    if not (case.cut or case.deep):
        return
    stack = Stack.open(model)
    keep = unequal_keep(stack)
    pruned = pruned_checkpoint(model, keep, tmp_path / "pruned")
    masked = masked_dense(model, keep)
    ids = ids_for("t5-relu-tied" if case.family == "t5" else case.family, 1, 45)
    with torch.no_grad():
        found, expected = (logits(each, ids) for each in (pruned, masked))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    if case.deep:
        assert_generates_alike(pruned, masked)
        assert_saliency_is_naive(model, stack, ids)


def logits(model, ids):
    if isinstance(ids, tuple):
        return model(input_ids=ids[0], decoder_input_ids=ids[1]).logits
    return model(ids).logits


def assert_generates_alike(pruned, masked):
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if masked.config.is_encoder_decoder:
        if masked.config.num_layers != masked.config.num_decoder_layers:
            return  # transformers 5.23 sizes the cache of generate by the encoder
        settings["decoder_start_token_id"] = 0
    prompt = random_ids(2, 5)
    assert torch.equal(pruned.generate(prompt, **settings), masked.generate(prompt, **settings))


def assert_saliency_is_naive(model, stack, ids):
    objective, saliency = naive_saliency(model, ids)
    found = channel_saliency(stack, ids, microbatch=1)
    assert found.objective == pytest.approx(objective, rel=1e-5)
    rtol = 1e-3 if stack.architecture.is_encoder_decoder else 1e-4
    for site in stack.architecture.sites():
        for slot in site.weight_slots:
            expected = saliency[slot.parameter].sum(dim=1 - slot.dim)
            atol = 1e-6 * float(expected.max())
            torch.testing.assert_close(found.sums[channel_key(slot)], expected, rtol=rtol, atol=atol)


# -- which keys there are --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_key_is_known(family):
    """A key of transformers' code that no case throws and no line excuses: a switch of a new release."""
    config = t5_configs()["t5-relu-tied"] if family == "t5" else family_configs()[family]
    tried = {key for case in CASES if case.family == family for key in keys_in(case)}
    known = tried | set(INERT) | (set(OF_YARN) if family == "phi3" else set())
    assert keys_read(architecture_for(config).skeleton) - known == set()


def keys_in(case):
    yield from case.values
    yield case.switch.split(".")[0]
    outer = [case.values.get("rope_parameters") or {}, case.values.get("rope_scaling") or {}]
    inner = [value for rope in outer for value in rope.values() if isinstance(value, dict)]
    yield from (f"rope_parameters.{key}" for rope in [*outer, *inner] for key in rope)


# phi3's configuration takes yarn for longrope, or refuses it
OF_YARN = [f"rope_parameters.{key}" for settings in YARN.values() for key in settings]


def test_every_kind_of_rotary_embedding_is_tried():
    assert set(ROPES) == {"default", *ROPE_INIT_FUNCTIONS}


def test_the_sweep_is_wide():
    pairs = {str(case) for case in CASES}
    assert len(pairs) == len(CASES) >= 150
