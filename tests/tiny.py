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
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

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
    }


def save_family(name: str, path: Path, seed: int = 0) -> Path:
    """Save a random model of `family_configs()[name]`, biases and norms not trivial, and return `path`."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(family_configs()[name]).eval()
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


def random_keep(sites, seed: int = 0, share: float = 0.6):
    """Keep a random part of every site, at least one unit."""
    import numpy as np

    generator = np.random.default_rng(seed)
    return {
        site.name: np.sort(generator.permutation(site.units)[: max(1, round(share * site.units))]) for site in sites
    }


def masked_dense(path: Path, keep, eager: bool = False):
    """Return the dense model with the parameters of all other units set to zero: the reference for pruning."""
    import torch
    from transformers import AutoModelForCausalLM

    from nirvana.walk import Stack

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager" if eager else "sdpa").eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for site in Stack.open(path).architecture.sites():
            for unit in sorted(set(range(site.units)) - set(keep[site.name].tolist())):
                for slot in site.slots:
                    start = slot.base + unit * slot.block
                    parameters[slot.parameter].narrow(slot.dim, start, slot.block).zero_()
    return model
