#!/usr/bin/env bash
# transformers 5.23.0: which ids a tokenizer's files give depends on `model_type` in config.json, not on the class that
# tokenizer_config.json names.
#
# A guess: tokenizer.json is the whole tokenizer, tokenizer_class in tokenizer_config.json names its class. Behaviour:
# AutoTokenizer takes some model types' own class whatever is named there, and that class sets normaliser and
# pre-tokenizer of its own over those in tokenizer.json. A directory whose config says qwen2 (as DeepSeek-R1-Distill-Qwen
# does, naming LlamaTokenizerFast) cuts "In 1984, 12345" otherwise than the very same files under a model type that
# transformers does not know, e.g. that of a model derived from it.
#
# Seen: qwen2: Qwen2Tokenizer, digits one by one, 13 tokens; another model type: TokenizersBackend, 4 tokens.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/python" -m pip install -q --disable-pip-version-check transformers==5.23.0 numpy==2.4.6
cd "$tmp"
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$tmp/venv/bin/python" - <<'PYTHON'
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(vocab_size=512, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
tokenizer.train_from_iterator(["In 1984, 12345 was a number. In 1984, 12345 it was."] * 50, trainer)


class Derived(PretrainedConfig):
    model_type = "derived_qwen2"


AutoConfig.register("derived_qwen2", Derived)
tokens = {}
for model_type in ("qwen2", "derived_qwen2"):
    directory = Path(model_type)
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizerFast"}))
    loaded = AutoTokenizer.from_pretrained(directory)
    tokens[model_type] = loaded.tokenize("In 1984, 12345")
    print(f"{model_type}: {type(loaded).__name__}, {len(tokens[model_type])} tokens {tokens[model_type]}")
assert Path("qwen2/tokenizer.json").read_bytes() == Path("derived_qwen2/tokenizer.json").read_bytes()
assert tokens["qwen2"] != tokens["derived_qwen2"], "the same files give the same ids now"
PYTHON
