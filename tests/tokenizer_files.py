"""Tokenizers in the forms in which people have them: files beside a model, made without any network."""

import io
import json
import random
from pathlib import Path

from tiny import tiny_sentence

_SIZE = 500
_OTHER = [
    "In 1984, 12345 people",
    "by 2001 it was 1,234,567",
    "naïve café",
    "12 34 56 78 90",
    "def f(x): return x ** 2",
]


def words() -> list[str]:
    """Return the text that all of them are trained on: English with numbers in it."""
    generator = random.Random(0)
    return [f"{tiny_sentence(generator)} {_OTHER[number % 5]} {generator.randrange(3000)}" for number in range(800)]


def byte_level(path: Path, class_name: str | None, **config: object) -> Path:
    """Write a byte-level BPE tokenizer.json that cuts text as GPT-2 does, so that numbers are merged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=_SIZE, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(words(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(path / "tokenizer.json"))
    return named(path, class_name, **({"bos_token": "<s>", "eos_token": "</s>"} | config))


def vocab_and_merges(path: Path, class_name: str | None, **config: object) -> Path:
    """Write the same as vocab.json and merges.txt, without tokenizer.json."""
    byte_level(path, class_name, **config)
    model = json.loads((path / "tokenizer.json").read_text())["model"]
    (path / "tokenizer.json").unlink()
    (path / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
    return path


def sentencepiece(path: Path, name: str, class_name: str | None, kind: str = "bpe", **config: object) -> Path:
    """Write a sentencepiece model of bytes and pieces (bpe), or as T5 has it (unigram, pad first)."""
    import sentencepiece as sp

    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} if kind == "unigram" else {"pad_id": -1}
    if kind == "bpe":
        ids |= {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    model = io.BytesIO()
    sp.SentencePieceTrainer.train(
        sentence_iterator=iter(words()),
        model_writer=model,
        vocab_size=_SIZE if kind == "bpe" else 300,
        model_type=kind,
        hard_vocab_limit=False,
        minloglevel=2,
        split_digits=False,
        num_threads=1,
        **ids,
    )
    (path / name).write_bytes(model.getvalue())
    return named(path, class_name, **config)


def named(path: Path, class_name: str | None, **config: object) -> Path:
    """Write tokenizer_config.json; None: without a class in it."""
    values = config | ({} if class_name is None else {"tokenizer_class": class_name})
    (path / "tokenizer_config.json").write_text(json.dumps(values))
    return path
