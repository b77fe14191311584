"""Train a small T5 by span corruption, in plain torch, in minutes on two cores."""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from nirvana.files import atomic_directory, write_json
from tasks.corpus.span_corruption import PairMaker, Pairs

_LOG = logging.getLogger(__name__)

RECORD = "training.json"
_PAD, _EOS = 0, 1
_SENTINELS = 100
_VALIDATION_PAIRS = 128


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how.

    Attributes:
        vocabulary: Tokens, sentinels included.
        hidden: Width of both residual streams.
        heads: Heads of each attention.
        head_dim: Width of a head.
        neurons: Of each gated feed-forward.
        layers: Of the encoder, and of the decoder.
        steps: Optimiser steps.
        batch: Stretches of text a step.
        length: Tokens of text a stretch, from which source and target are made.
        learning_rate: The highest, relative to each weight matrix's first size; it rises over the first steps and
            falls to zero.
        warmup: Steps of the rise.
        seed: Of the first weights and the order of the text.
    """

    vocabulary: int = 4096
    hidden: int = 192
    heads: int = 6
    head_dim: int = 32
    neurons: int = 512
    layers: int = 3
    steps: int = 700
    batch: int = 16
    length: int = 128
    learning_rate: float = 0.02
    warmup: int = 50
    seed: int = 0


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """Return a byte-level BPE tokenizer with pad, EOS (appended to what is encoded) and T5's sentinel tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "</s>", *(f"<extra_id_{number}>" for number in range(_SENTINELS))],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", _EOS)])
    names = {"pad_token": "<pad>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def build_model(recipe: Recipe) -> Any:
    """Return a T5 with gated feed-forwards and random weights."""
    from transformers import T5Config, T5ForConditionalGeneration

    settings: dict[str, Any] = {
        "vocab_size": recipe.vocabulary,
        "d_model": recipe.hidden,
        "d_kv": recipe.head_dim,
        "d_ff": recipe.neurons,
        "num_layers": recipe.layers,
        "num_heads": recipe.heads,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,  # the text is hardly seen twice
        "pad_token_id": _PAD,
        "eos_token_id": _EOS,
        "decoder_start_token_id": _PAD,
    }
    torch.manual_seed(recipe.seed)
    return T5ForConditionalGeneration(T5Config(**settings))


def train_t5(
    train: Sequence[str], validation: Sequence[str], recipe: Recipe, directory: Path, origin: Mapping[str, str]
) -> None:
    """Train a model and save it with its tokenizer; the directory appears when all is done.

    Args:
        train: Documents to learn from.
        validation: Documents to measure the loss on.
        recipe: What is trained, and how.
        directory: Receives a Hugging Face model directory and training.json.
        origin: What training.json is to remember beside the recipe.
    """
    start = time.monotonic()
    tokenizer = train_tokenizer(train, recipe.vocabulary)
    model = build_model(recipe)
    maker = PairMaker.of_model(tokenizer, model.config)
    stream, judged = (_token_stream(tokenizer, texts) for texts in (train, validation))
    _LOG.info("training %s parameters on %s tokens", f"{_count(model):,}", f"{len(stream):,}")
    _run(model, _batches(stream, maker, recipe), recipe)
    starts = np.linspace(0, len(judged) - recipe.length, _VALIDATION_PAIRS).astype(int)
    pairs = maker(_stretches(judged, starts, recipe.length), "validation")
    seen = maker(_stretches(stream, _spread(stream, recipe.length), recipe.length), "unigram")
    # what reading adds: the same targets, each with the source of another
    exchanged = replace(pairs, input_ids=np.roll(pairs.input_ids, 1, axis=0))
    record = {
        "recipe": asdict(recipe),
        **origin,
        "parameters": _count(model),
        "train_tokens": len(stream),
        "tokens_read": recipe.steps * recipe.batch * recipe.length,
        "loss": validation_loss(model, pairs),
        "loss_other_source": validation_loss(model, exchanged),
        "loss_unigram": unigram_loss(seen.labels, pairs.labels, recipe.vocabulary),
        "loss_uniform": math.log(recipe.vocabulary),
        "seconds": round(time.monotonic() - start, 1),
    }
    with atomic_directory(directory) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / RECORD, record)


def _run(model: Any, batches: Iterator[Pairs], recipe: Recipe) -> None:
    model.train()
    parameters = list(model.parameters())
    # T5's first weights differ in size by a factor of 80; as in its own training a step is relative to that
    sizes = [float(parameter.detach().square().mean().sqrt()) for parameter in parameters]
    groups = [
        {"params": [parameter], "lr": recipe.learning_rate * size}
        for parameter, size in zip(parameters, sizes, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)

    def factor(step: int) -> float:
        return min((step + 1) / recipe.warmup, (recipe.steps - step) / (recipe.steps - recipe.warmup))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    average = None
    with tqdm(total=recipe.steps, desc="training", unit="step") as progress:
        for pairs, _ in zip(batches, range(recipe.steps), strict=False):
            loss = _loss(model, pairs)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
            progress.set_postfix(loss=f"{average:.3f}", refresh=False)
            progress.update()
    model.eval()


def _loss(model: Any, pairs: Pairs) -> Tensor:
    output = model(
        input_ids=torch.from_numpy(pairs.input_ids), decoder_input_ids=torch.from_numpy(pairs.decoder_input_ids)
    )
    return cross_entropy(output.logits.flatten(0, 1), torch.from_numpy(pairs.labels).flatten())


@torch.inference_mode()
def validation_loss(model: Any, pairs: Pairs) -> float:
    """Return the mean negative log-likelihood of a target token, in nats."""
    return float(_loss(model, pairs))


def unigram_loss(train: np.ndarray, judged: np.ndarray, vocabulary: int) -> float:
    """Return the loss of a model that knows how often each token occurs in targets, and nothing else."""
    counts = np.bincount(train.ravel(), minlength=vocabulary) + 1.0
    return float(-np.log(counts / counts.sum())[judged].mean())


def _token_stream(tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    parts = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts)
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])


def _batches(stream: np.ndarray, maker: PairMaker, recipe: Recipe) -> Iterator[Pairs]:
    generator = np.random.default_rng(recipe.seed)
    step = 0
    while True:
        starts = generator.integers(0, len(stream) - recipe.length, recipe.batch)
        yield maker(_stretches(stream, starts, recipe.length), f"train {step}")
        step += 1


def _spread(stream: np.ndarray, length: int) -> np.ndarray:
    return np.arange(0, len(stream) - length, length)


def _stretches(stream: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    return stream[starts[:, None] + np.arange(length)]


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
