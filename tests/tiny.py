"""A tiny model, a tokenizer and a corpus that tests make for themselves, without any network."""

import random
from pathlib import Path

_NOUNS = [
    "river",
    "law",
    "nation",
    "treaty",
    "harbor",
    "citizen",
    "army",
    "budget",
    "railway",
    "farmer",
    "court",
    "election",
    "senate",
    "ocean",
]
_VERBS = ["protects", "divides", "improves", "carries", "measures", "defends", "rewards", "governs", "opens", "repairs"]
_ADJECTIVES = ["great", "public", "foreign", "quiet", "honest", "new", "western", "annual", "civil", "steady"]


def tiny_sentence(generator: random.Random) -> str:
    """Return one English-looking sentence."""
    return (
        f"The {generator.choice(_ADJECTIVES)} {generator.choice(_NOUNS)} {generator.choice(_VERBS)} "
        f"the {generator.choice(_ADJECTIVES)} {generator.choice(_NOUNS)} of the {generator.choice(_NOUNS)}."
    )


def tiny_corpus(path: Path, documents: int = 60, sentences: int = 60) -> Path:
    """Write `documents` text files below `path` and return it."""
    path.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        generator = random.Random(number)
        text = " ".join(tiny_sentence(generator) for _ in range(sentences))
        (path / f"{1800 + number}-Speech-1.txt").write_text(text + "\n", encoding="utf-8")
    return path


def tiny_tokenizer():
    """Return a byte-level BPE tokenizer of 512 tokens with BOS and EOS, trained on the tiny corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    generator = random.Random(0)
    tokenizer.train_from_iterator([tiny_sentence(generator) for _ in range(400)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=512)


def tiny_llama(path: Path, seed: int = 0, **overrides: object) -> Path:
    """Save a random Llama (2 layers, 4 heads in 2 KV groups, 64 neurons) with the tiny tokenizer; return `path`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    } | overrides
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def _common() -> dict[str, object]:
    return {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }


def family_configs() -> dict[str, object]:
    """Return one tiny configuration for each supported layout, by a telling name."""
    from transformers import (
        Gemma3TextConfig,
        GraniteConfig,
        LlamaConfig,
        MistralConfig,
        Phi3Config,
        Qwen2Config,
        Qwen3Config,
        Qwen3MoeConfig,
    )

    def make(config_class, **overrides):
        return config_class(**(_common() | overrides))

    return {
        "llama": make(LlamaConfig, tie_word_embeddings=True),
        "llama-untied-biases": make(LlamaConfig, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
        "llama-mqa": make(LlamaConfig, num_key_value_heads=1),
        "llama-mha": make(LlamaConfig, num_key_value_heads=4),
        "llama3-rope": make(
            LlamaConfig,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
        "mistral": make(MistralConfig, head_dim=8, sliding_window=None),
        "mistral-sliding": make(MistralConfig, head_dim=8, sliding_window=6),
        "qwen2": make(Qwen2Config, tie_word_embeddings=True),
        "qwen2-sliding": make(Qwen2Config, use_sliding_window=True, sliding_window=6, max_window_layers=1),
        "qwen3": make(Qwen3Config, head_dim=16),
        "qwen3-biases": make(Qwen3Config, head_dim=16, attention_bias=True, tie_word_embeddings=True),
        "phi3": make(Phi3Config, pad_token_id=0, sliding_window=None),
        "phi3-sliding-partial-rotary": make(
            Phi3Config, pad_token_id=0, sliding_window=6, partial_rotary_factor=0.5, num_key_value_heads=4
        ),
        "gemma3_text": make(
            Gemma3TextConfig,
            head_dim=16,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            query_pre_attn_scalar=16,
        ),
        "gemma3_text-softcap-biases": make(
            Gemma3TextConfig,
            head_dim=16,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
            final_logit_softcapping=5.0,
            attention_bias=True,
        ),
        "granite": make(
            GraniteConfig,
            embedding_multiplier=6.0,
            logits_scaling=4.0,
            residual_multiplier=0.5,
            attention_multiplier=0.25,
        ),
        "granite-biases": make(GraniteConfig, embedding_multiplier=6.0, attention_bias=True, mlp_bias=True),
        "qwen3_moe": make(
            Qwen3MoeConfig,
            head_dim=16,
            moe_intermediate_size=24,
            num_local_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            mlp_only_layers=[1],
            output_router_logits=False,
        ),
    }


def all_families() -> list[str]:
    """Return the names that `save_family` knows: decoder-only layouts and those of T5."""
    return sorted([*family_configs(), *t5_configs()])


def one_layout_each() -> list[str]:
    """Return the first layout of each family, and both of T5, for tests that take long."""
    first = {config.model_type: name for name, config in reversed(family_configs().items())}
    return sorted([*first.values(), *t5_configs()])


def model_type_of(name: str) -> str:
    """Return the family that a layout of `all_families` belongs to."""
    return (family_configs() | t5_configs())[name].model_type


def save_family(name: str, path: Path, seed: int = 0, **overrides: object) -> Path:
    """Save a random model of `all_families()`, biases and norms not trivial, and return `path`."""
    if name in t5_configs():
        return save_t5(name, path, seed, **overrides)
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = family_configs()[name]
    if overrides:
        config = type(config)(**{**config.to_dict(), "layer_types": None, **overrides})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path


def random_ids(sequences: int, tokens: int, seed: int = 0):
    """Return random token ids of the tiny vocabulary."""
    import torch

    return torch.randint(0, 512, (sequences, tokens), generator=torch.Generator().manual_seed(seed))


def ids_for(name: str, sequences: int, tokens: int, seed: int = 0):
    """Return token ids of a layout's stacks: one tensor, or for an encoder-decoder two of different lengths."""
    if name in t5_configs():
        return random_ids(sequences, tokens, seed), random_ids(sequences, max(2, tokens - 4), seed + 1)
    return random_ids(sequences, tokens, seed)


def logits_of(model, ids):
    """Return a model's logits for `ids_for`."""
    return model(input_ids=ids[0], decoder_input_ids=ids[1]).logits if isinstance(ids, tuple) else model(ids).logits


def random_keep(sites, seed: int = 0, share: float = 0.6):
    """Keep a random part of every site, at least one unit."""
    import numpy as np

    generator = np.random.default_rng(seed)
    return {
        site.name: np.sort(generator.permutation(site.units)[: max(1, round(share * site.units))]) for site in sites
    }


def masked_dense(path: Path, keep, eager: bool = False):
    """Return the dense model with the parameters of all other units set to zero: the reference for pruning."""
    import shutil
    import tempfile

    from safetensors.torch import load_file, save_file

    from nirvana.loading import load_model
    from nirvana.walk import Stack

    (file,) = path.glob("*.safetensors")
    parameters = load_file(file)
    for site in Stack.open(path).architecture.sites():
        for unit in sorted(set(range(site.units)) - set(keep[site.name].tolist())):
            for slot in site.slots:
                if slot.stored_as is None:  # else other layers read it too
                    start = slot.base + unit * slot.block
                    parameters[slot.parameter].narrow(slot.dim, start, slot.block).zero_()
    with tempfile.TemporaryDirectory() as masked:
        for companion in path.glob("*.json"):
            shutil.copy(companion, masked)
        save_file(parameters, Path(masked) / file.name, {"format": "pt"})
        model = load_model(masked)
    model.set_attn_implementation("eager" if eager else "sdpa")
    return model


def pruned_checkpoint(model: Path, keep, target: Path):
    """Prune a model to the given units, and return it loaded."""
    from nirvana.allocation import Allocation
    from nirvana.loading import load_model
    from nirvana.plan import Plan
    from nirvana.surgery import prune
    from nirvana.walk import Stack
    from nirvana.weights import model_digest

    sites = Stack.open(model).architecture.sites()
    plan = Plan.build(
        sites,
        keep,
        model_digest=model_digest(model),
        model_type="any",
        calibration_digest="sha256:none",
        allocation=Allocation(0.4),
    )
    prune(model, plan, target)
    return load_model(target)


def walk_logits(stack, keep, ids):
    """Return the logits that the walk gives; soft-capped where the family does that."""
    import torch

    from nirvana.walk import final_hidden_states

    logits = final_hidden_states(stack, ids, keep) @ stack.head_weight().T
    cap = stack.architecture.logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def tiny_t5_tokenizer(sentinels: int = 100):
    """Return a byte-level BPE tokenizer of 512 tokens with pad, EOS (appended) and T5's sentinel tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    extra = [f"<extra_id_{number}>" for number in range(sentinels)]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "</s>", *extra],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    generator = random.Random(0)
    tokenizer.train_from_iterator([tiny_sentence(generator) for _ in range(400)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=512
    )


def t5_configs() -> dict[str, object]:
    """Return one tiny configuration for each layout of T5, by a telling name."""
    from transformers import T5Config

    def make(**overrides):
        settings = {
            "vocab_size": 512,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_decoder_layers": 3,
            "num_heads": 4,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 16,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        }
        return T5Config(**(settings | overrides))

    return {
        "t5-relu-tied": make(),
        # as v1.1: transformers ties whatever the configuration says, unless the file has a head of its own
        "t5-gated-gelu-untied": make(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    }


def save_t5(name: str, path: Path, seed: int = 0, **overrides: object) -> Path:
    """Save a random T5 of `t5_configs()[name]`, norms not trivial, heads that attend unevenly; return `path`."""
    import torch
    from transformers import T5ForConditionalGeneration

    config = t5_configs()[name]
    for key, value in overrides.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(config).eval()
    if not config.scale_decoder_outputs:  # how transformers remembers v1.1
        model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn_like(model.lm_head.weight))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif parameter_name.endswith((".q.weight", ".k.weight")):
                parameter.mul_(4)
    model.save_pretrained(path)
    return path


def tiny_t5(path: Path, name: str = "t5-relu-tied", seed: int = 0, sentinels: int = 100, **overrides: object) -> Path:
    """Save a random T5 with its tokenizer; return `path`."""
    save_t5(name, path, seed, **overrides)
    tiny_t5_tokenizer(sentinels).save_pretrained(path)
    return path


def tiny_recipe(steps: int):
    """Return the recipe of a model of 2 layers, 4 heads in 2 KV groups and 24 neurons, for studies that train it."""
    from studies.tiny_model import Recipe

    return Recipe(
        vocabulary=128,
        hidden=16,
        layers=2,
        kv_groups=2,
        queries_per_kv=2,
        head_dim=4,
        neurons=24,
        length=16,
        batch=4,
        steps=steps,
        warmup=2,
    )
