#!/usr/bin/env bash
# lm_eval 0.4.13: loglikelihood_rolling (word_perplexity, byte_perplexity, bits_per_byte) counts the probability of a BOS
# after a BOS as that of the text's first token, where the tokenizer puts a BOS itself.
#
# A guess: the prefix token conditions the first token of the text. Behaviour: the text is encoded with special tokens,
# so a tokenizer of Llama's kind puts a BOS first; the windows then get the prefix token, BOS again, before it. What is
# scored is [BOS | BOS] and the text behind it: one token too many, and one that no training text held.
#
# Seen: 4 words; rolling gives -24.77, as 5 predictions with log P(BOS | BOS); the text after one BOS has -17.53.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/python" -m pip install -q --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 'lm_eval==0.4.13' accelerate==1.15.0 numpy==2.4.6
cd "$tmp"
HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$tmp/venv/bin/python" - <<'PYTHON'
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = {word: number for number, word in enumerate(["<s>", "</s>", "<unk>", "a", "ship", "can", "sink"])}
backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    initializer_range=0.5, bos_token_id=0, eos_token_id=1,
)
model = LlamaForCausalLM(config).eval()
text = "a ship can sink"
judge = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu", max_length=64)
request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
(rolling,) = judge.loglikelihood_rolling([request], disable_tqdm=True)


def summed(ids):
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logs[place, token].item() for place, token in enumerate(ids[1:]))


once, twice = summed([0, 3, 4, 5, 6]), summed([0, 0, 3, 4, 5, 6])
print(f"rolling {rolling:.4f}; text after one BOS {once:.4f}; BOS and text after a BOS {twice:.4f}")
assert abs(rolling - twice) < 1e-3 and abs(once - twice) > 0.1, "a BOS of the tokenizer's own is no longer scored"
PYTHON
