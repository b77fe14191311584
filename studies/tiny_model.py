"""A tiny transformer trained here in minutes, for studies that need many models or all of a model's gradients at once.

It is a Llama unless the recipe names another family: the same sizes, with what sets that family apart.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from nirvana.errors import InputError
from nirvana.files import atomic_directory, atomic_file, read_json, write_json
from studies.store import study_key
from tasks.corpus.documents import read_documents
from tasks.sample_pool import split_documents

RECORD = "training.json"
_TOKENIZER_CHARACTERS = 1_000_000
"""Of text that a vocabulary is learnt from: more changes few of its tokens."""
_WINDOWS = 4
"""Of a sequence, where a family attends to a window: each layer sees a quarter."""

Ids = Int[Tensor, "sequences tokens"]


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how; AdamW with a linear rise and a cosine fall to zero.

    Attributes:
        vocabulary: Tokens of a byte-level BPE.
        hidden: Width of the residual stream.
        layers: Decoder layers.
        kv_groups: KV heads of a layer.
        queries_per_kv: Query heads of a KV group.
        head_dim: Width of a head.
        neurons: Of each gated MLP.
        length: Tokens of every sequence, here and wherever the model is used.
        batch: Sequences a step.
        steps: Optimiser steps.
        learning_rate: The highest.
        warmup: Steps of the rise.
        family: One of `FAMILIES`.
    """

    vocabulary: int = 512
    hidden: int = 64
    layers: int = 4
    kv_groups: int = 4
    queries_per_kv: int = 2
    head_dim: int = 8
    neurons: int = 176
    length: int = 64
    batch: int = 16
    steps: int = 1000
    learning_rate: float = 8e-3
    warmup: int = 50
    family: str = "llama"


@dataclass(frozen=True)
class Text:
    """Token ids of the corpus, by the pipeline's own splits: what judges a model is not what it learnt from."""

    train: Int[Tensor, " tokens"]
    heldout: Int[Tensor, " tokens"]

    def batch(self, generator: np.random.Generator, sequences: int, length: int) -> Ids:
        """Draw random stretches of the training text."""
        starts = generator.integers(0, len(self.train) - length, sequences)
        return _stretches(self.train, starts, length)

    def spread(self, sequences: int, length: int) -> Ids:
        """Return stretches of the held-out text at even distances: the same ones each time.

        Raises:
            InputError: If they would overlap.
        """
        room = len(self.heldout) // sequences
        if room < length:
            raise InputError(
                f"held-out text: expected {sequences} sequences of {length} tokens, got {len(self.heldout)} tokens in "
                "all; use a larger corpus"
            )
        return _stretches(self.heldout, room * np.arange(sequences), length)


def _stretches(stream: Tensor, starts: np.ndarray, length: int) -> Ids:
    return stream[torch.from_numpy(starts)[:, None] + torch.arange(length)].to(torch.int64)


def read_text(corpus: Path, vocabulary: int, cache: Path) -> Text:
    """Return the corpus as token ids, tokenized once.

    Args:
        corpus: What step fetch_corpus wrote.
        vocabulary: Tokens of the BPE that is learnt from the training text.
        cache: Directory that keeps the ids.

    Raises:
        InputError: If there is no such corpus.
    """
    parts = {"kind": "text", "corpus": read_json(corpus / "source.json")["digest"], "vocabulary": vocabulary}
    file = cache / f"text-{study_key(parts, read_text)[:16]}.safetensors"
    if not file.is_file():
        splits = split_documents(read_documents(corpus / "documents.jsonl"))
        train, heldout = ([document.text for document in splits[name]] for name in ("calibration", "heldout"))
        tokenizer = _train_tokenizer(train, vocabulary)
        tensors = {"train": _encode(tokenizer, train), "heldout": _encode(tokenizer, heldout)}
        with atomic_file(file) as temporary:
            save_file(tensors, temporary)
    return Text(**load_file(file))


def _train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # no initial alphabet: f takes every token's largest logit, and those of bytes that never occur would be noise
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False)
    share = _TOKENIZER_CHARACTERS // max(1, len(texts))  # of each text: the language changed in two centuries
    tokenizer.train_from_iterator([text[: max(1000, share)] for text in texts], trainer)
    return tokenizer


def _encode(tokenizer: Any, texts: Sequence[str]) -> Int[Tensor, " tokens"]:
    ids = [np.asarray(encoded.ids, dtype=np.int32) for encoded in tokenizer.encode_batch_fast(list(texts))]
    return torch.from_numpy(np.concatenate(ids))


def trained_model(text: Text, recipe: Recipe, seed: int, corpus_digest: str, cache: Path) -> Path:
    """Return the directory of a model of this recipe, trained now unless it is there.

    Args:
        text: What to learn from.
        recipe: What is trained, and how.
        seed: Of the first weights and the order of the text.
        corpus_digest: Of the text.
        cache: Directory of trained models.

    Returns:
        A Hugging Face model directory with training.json in it.
    """
    parts = {"kind": "model", "recipe": asdict(recipe), "seed": seed, "corpus": corpus_digest}
    directory = cache / f"model-{study_key(parts, trained_model)[:16]}"
    if (directory / RECORD).is_file():
        return directory
    model = build_model(recipe, seed)
    losses = train(model, text, recipe, np.random.default_rng(seed))
    heldout = text.spread(64, recipe.length)
    with atomic_directory(directory) as temporary:
        model.save_pretrained(temporary)
        write_json(temporary / RECORD, parts | {"loss": mean_loss(model, heldout), "training_losses": losses[::10]})
    return directory


def build_model(recipe: Recipe, seed: int) -> Any:
    """Return a model of the recipe's family with tied embeddings and random weights.

    Raises:
        InputError: If there is no such family.
    """
    import transformers

    check_families([recipe.family])
    config_class, model_class, own = FAMILIES[recipe.family]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.neurons,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.kv_groups * recipe.queries_per_kv,
        num_key_value_heads=recipe.kv_groups,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.length,
        initializer_range=1 / math.sqrt(recipe.hidden),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        **own(recipe),
    )
    return getattr(transformers, model_class)(config)


def _mistral(recipe: Recipe) -> dict[str, Any]:
    return {"sliding_window": recipe.length // _WINDOWS}


def _phi3(recipe: Recipe) -> dict[str, Any]:
    return {"pad_token_id": None, "original_max_position_embeddings": recipe.length, "sliding_window": None}


def _gemma3_text(recipe: Recipe) -> dict[str, Any]:
    kinds = ["sliding_attention", "full_attention"]  # in turns: with six layers Gemma's five to one leaves one full
    return {
        "pad_token_id": None,
        "sliding_window": recipe.length // _WINDOWS,
        "layer_types": [kinds[layer % 2] for layer in range(recipe.layers)],
        "query_pre_attn_scalar": recipe.head_dim,
    }


def _nothing(recipe: Recipe) -> dict[str, Any]:
    return {}


FAMILIES: dict[str, tuple[str, str, Callable[[Recipe], dict[str, Any]]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _nothing),
    # q, k and v have biases
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _nothing),
    # q and k are normed, head by head
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _nothing),
    # each token sees a window
    "mistral": ("MistralConfig", "MistralForCausalLM", _mistral),
    # q, k and v are one matrix, gate and up another
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _phi3),
    # GELU, norms behind each module too, normed q and k, a window in every other layer
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", _gemma3_text),
}
"""By `model_type`: the classes in transformers, and what the configuration takes beside the common values."""


def check_families(names: Sequence[str]) -> None:
    """Refuse families that no model can be built of.

    Raises:
        InputError: If there are some.
    """
    unknown = [name for name in names if name not in FAMILIES]
    if unknown or not names:
        raise InputError(
            f"families: expected some of {','.join(FAMILIES)}, got {','.join(unknown) or 'none'}; correct them"
        )


def train(model: Any, text: Text, recipe: Recipe, generator: np.random.Generator) -> list[float]:
    """Train in place; return the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)

    def factor(step: int) -> float:
        fall = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
        return min((step + 1) / recipe.warmup, 0.5 * (1 + math.cos(math.pi * max(0.0, fall))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    model.train()
    for _ in range(recipe.steps):
        losses.append(step(model, text.batch(generator, recipe.batch, recipe.length), optimizer))
        schedule.step()
    model.eval()
    return losses


def step(model: Any, ids: Ids, optimizer: torch.optim.Optimizer) -> float:
    """Take one optimiser step; return the loss before it, in nats a token."""
    loss = next_token_loss(model, ids)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def next_token_loss(model: Any, ids: Ids) -> Float[Tensor, ""]:
    """Return the mean negative log-likelihood of each token after a sequence's first, in nats."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@torch.inference_mode()
def mean_loss(model: Any, ids: Ids) -> float:
    """Return the mean loss on some sequences, in nats a token."""
    return float(next_token_loss(model, ids))
