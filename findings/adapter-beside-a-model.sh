#!/usr/bin/env bash
# transformers 5.23.0 with peft 0.21.2: adapter files in a model's directory change the model, without being asked for.
#
# A guess: from_pretrained of a directory with config.json and model.safetensors loads these weights; adapters need
# load_adapter or PeftModel. Behaviour: where adapter_config.json lies beside them (training into the model's own
# directory leaves it there) and peft is installed, both AutoModelForCausalLM and the class itself load the model and
# put the adapter on it. The type of what is returned is the model's own; a progress bar is all that tells.
#
# Seen: loaded before and after saving the adapter beside it, same ids: logits differ by 0.22 of 0.41 with both classes.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/python" -m pip install -q --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 numpy==2.4.6
cd "$tmp"
HF_HUB_OFFLINE=1 "$tmp/venv/bin/python" - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)
model = LlamaForCausalLM(config).eval()
model.save_pretrained("model")
ids = torch.randint(0, 128, (1, 16))
with torch.no_grad():
    before = AutoModelForCausalLM.from_pretrained("model")(ids).logits
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained("model")
    for loader in (AutoModelForCausalLM, LlamaForCausalLM):
        loaded = loader.from_pretrained("model")
        difference = (loaded(ids).logits - before).abs().max().item()
        print(f"{loader.__name__}: a {type(loaded).__name__}, differs by {difference:.2f} of {before.abs().max():.2f}")
        assert type(loaded).__name__ == "LlamaForCausalLM"
        assert difference > 0.01, "the adapter beside the model is no longer applied"
PYTHON
