#!/usr/bin/env bash
# transformers 5.23.0: rope type "dynamic" makes a model's answer depend on which texts it saw before.
#
# A guess: a model in evaluation mode is a function of its input. Behaviour: the rotary module keeps the frequencies of
# the longest text so far, and takes the original ones back only when a text within max_position_embeddings comes. A
# text of 48 tokens (limit 32) therefore gives one answer in a fresh model, another one after a text of 96 tokens, and
# the first again after one of 8. Prefill and cached decoding differ as well: keys in the cache keep the frequencies of
# their time.
#
# Seen: fresh against after a longer text 2.51 (largest logit 4.07); after a short one 0; cached against whole 1.32.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy==2.4.6
cd "$tmp"
HF_HUB_OFFLINE=1 "$tmp/venv/bin/python" - <<'PYTHON'
import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
config = LlamaConfig(
    vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=32, initializer_range=0.2, rope_parameters=rope,
)
model = LlamaForCausalLM(config).eval()
other = copy.deepcopy(model)
ids = torch.randint(0, 128, (1, 96))
with torch.no_grad():
    fresh = model(ids[:, :48], use_cache=False).logits
    model(ids, use_cache=False)
    after_long = model(ids[:, :48], use_cache=False).logits
    model(ids[:, :8], use_cache=False)
    after_short = model(ids[:, :48], use_cache=False).logits
    cache = other(ids[:, :40], use_cache=True).past_key_values
    cached = other(ids[:, 40:48], past_key_values=cache).logits
largest = fresh.abs().max().item()
differences = [(fresh - after_long).abs().max().item(), (fresh - after_short).abs().max().item(),
               (fresh[:, 40:] - cached).abs().max().item()]
print(f"largest logit {largest:.2f}; after a longer text {differences[0]:.2f}, after a short one {differences[1]:.2g}, "
      f"cached against whole {differences[2]:.2f}")
assert differences[0] > 0.1 * largest, "the answer no longer depends on an earlier, longer text"
assert differences[1] == 0, "a short text no longer resets the frequencies"
assert differences[2] > 0.05 * largest, "cached decoding agrees with the whole text now"
PYTHON
