"""Pruned checkpoints load where a user would load them."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from exports import run_elsewhere
from tiny import masked_dense, one_layout_each, random_ids, random_keep, save_family, save_t5, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from nirvana.allocation import Allocation
from nirvana.plan import Plan
from nirvana.surgery import prune
from nirvana.walk import Stack
from nirvana.weights import model_digest

FAMILIES = one_layout_each()


def make_checkpoint(name, root: Path, uniform=False):
    # transformers 5.23 sizes the cache of generate by the encoder: stacks of one depth
    save = partial(save_t5, num_decoder_layers=2) if name.startswith("t5") else save_family
    model = save(name, root / "dense")
    tiny_tokenizer().save_pretrained(model)
    sites = Stack.open(model).architecture.sites()
    if uniform:
        counts = {"attention": 1, "mlp": 16}
        keep = {site.name: np.arange(1, 1 + counts[site.module]) for site in sites}
        keep |= {site.name: np.arange(1) for site in sites if site.units == 1}
    else:
        keep = random_keep(sites)
        odd = "encoder.0.self_attention" if name.startswith("t5") else "layers.1.kv_group"
        keep[odd] = np.arange(2 if odd.startswith("layers") else 3)
    plan = Plan.build(
        sites,
        keep,
        model_digest=model_digest(model),
        model_type=name,
        calibration_digest="sha256:none",
        allocation=Allocation(0.4),
    )
    prune(model, plan, root / "pruned")
    return root / "pruned", keep


GREEDY = """
import torch
from transformers import {auto} as Auto
model = Auto.from_pretrained("pruned", trust_remote_code={trust}).eval()
ids = torch.tensor([{ids}])
print(type(model).__module__.split(".")[0], type(model).__name__)
print(model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist())
model.save_pretrained("again")
again = Auto.from_pretrained("again", trust_remote_code={trust}).eval()
inputs = dict(input_ids=ids, decoder_input_ids=ids) if model.config.is_encoder_decoder else dict(input_ids=ids)
print(torch.equal(again(**inputs).logits, model(**inputs).logits))
"""


def check_elsewhere(name, root, keep, trust):
    """Load in a process without nirvana; return the class's module and name once its text is the masked model's."""
    ids = random_ids(1, 5)
    auto = "AutoModelForSeq2SeqLM" if name.startswith("t5") else "AutoModelForCausalLM"
    out = run_elsewhere(GREEDY.format(trust=trust, ids=ids[0].tolist(), auto=auto), root).splitlines()
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = masked_dense(root / "dense", keep).generate(ids, **settings)[0].tolist()
    assert out[1:] == [str(expected), "True"]
    return out[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_loads_without_nirvana_when_code_is_trusted(name, tmp_path):
    _, keep = make_checkpoint(name, tmp_path)
    assert check_elsewhere(name, tmp_path, keep, trust=True).startswith("transformers_modules Nirvana")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_uniform_loads_in_stock_classes_without_a_flag(name, tmp_path):
    checkpoint, keep = make_checkpoint(name, tmp_path, uniform=True)
    assert not (checkpoint / "modeling_nirvana.py").exists()
    (stock,) = json.loads((tmp_path / "dense" / "config.json").read_text())["architectures"]
    assert check_elsewhere(name, tmp_path, keep, trust=False) == f"transformers {stock}"


@pytest.mark.slow
def test_code_is_not_run_without_the_flag(tmp_path):
    checkpoint, _ = make_checkpoint("llama", tmp_path)
    modelling = checkpoint / "modeling_nirvana.py"
    modelling.write_text("open('was_run', 'w').close()\n" + modelling.read_text())
    blocked = "import sys; sys.modules['nirvana'] = None\n"
    code = "from transformers import AutoModelForCausalLM as A; A.from_pretrained('pruned', trust_remote_code=False)"
    done = subprocess.run([sys.executable, "-c", blocked + code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "trust_remote_code" in done.stderr or "nirvana_llama" in done.stderr
    assert not (tmp_path / "was_run").exists()


@pytest.mark.slow
def test_import_nirvana_suffices_in_either_order(tmp_path):
    make_checkpoint("llama", tmp_path)
    load = "transformers.AutoModelForCausalLM.from_pretrained('pruned'); print(type(m).__module__)"
    for imports in (
        "import nirvana, transformers",
        "import transformers; transformers.AutoConfig; import nirvana",
        "import nirvana; from transformers import PreTrainedModel; import transformers",
        "import nirvana, transformers; transformers.AutoConfig.from_pretrained('pruned')",
    ):
        code = f"{imports}; m = {load}"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.strip() == "nirvana.checkpoint.modeling_nirvana", done.stderr


@pytest.mark.slow
def test_registration_alone_is_not_enough(tmp_path):
    """Decision 26: transformers does not look for the models of other packages; without the hook ours are unknown."""
    make_checkpoint("llama", tmp_path)
    unhooked = "import wrapt; wrapt.register_post_import_hook = lambda hook, name: None\n"
    code = "import nirvana, transformers; transformers.AutoConfig.from_pretrained('pruned', trust_remote_code=False)"
    known = "\nimport nirvana.checkpoint.modeling_nirvana as m; m.register('llama')\n" + code.partition("; ")[2]
    for text, works in ((code, False), ("import nirvana, transformers" + known, True)):
        done = subprocess.run([sys.executable, "-c", unhooked + text], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode == 0) == works, done.stderr
        assert works or "trust_remote_code" in done.stderr or "nirvana_llama" in done.stderr


def test_import_nirvana_is_light():
    code = "import nirvana, sys; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_save_and_load_is_exact(tmp_path):
    checkpoint, _ = make_checkpoint("qwen3", tmp_path)
    ids = random_ids(2, 9)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


LOAD = """
from transformers import {auto} as Auto, AutoTokenizer
model = Auto.from_pretrained("{folder}", trust_remote_code=True)
print(type(model).__module__.split(".")[0], type(model).__name__)
"""


@pytest.mark.parametrize("name", ["llama", pytest.param("t5-relu-tied", marks=pytest.mark.slow)])
def test_saved_again_it_loads_elsewhere(name, tmp_path):
    from nirvana.loading import load_model

    checkpoint, _ = make_checkpoint(name, tmp_path)
    model = load_model(checkpoint)
    assert type(model).__module__ == "nirvana.checkpoint.modeling_nirvana"
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/modeling_nirvana.py").read_text() == (checkpoint / "modeling_nirvana.py").read_text()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (checkpoint, tmp_path / "again"))
    assert after["auto_map"] == before["auto_map"]
    out = run_elsewhere(
        LOAD.format(auto=next(key for key in before["auto_map"] if "Model" in key), folder="again"), tmp_path
    )
    assert out.split() == ["transformers_modules", type(model).__name__]


@pytest.mark.slow
def test_lora_trains_on_it(tmp_path):
    from peft import LoraConfig, get_peft_model

    checkpoint, _ = make_checkpoint("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = random_ids(4, 12)
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = lora(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    lora.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert run_elsewhere(LOAD.format(auto="AutoModelForCausalLM", folder="merged"), tmp_path).startswith(
        "transformers_m"
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged(input_ids=ids, labels=ids).loss.item() < losses[0]


@pytest.mark.slow
def test_lm_eval_judges_it(tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    checkpoint, keep = make_checkpoint("llama", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    request = Instance("loglikelihood", {}, ("The great nation", " protects the river."), 0)

    def loglikelihood(model):
        judge = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu", max_length=128)
        return judge.loglikelihood([request], disable_tqdm=True)[0][0]

    pruned = loglikelihood(AutoModelForCausalLM.from_pretrained(checkpoint).eval())
    assert pruned == pytest.approx(loglikelihood(masked_dense(tmp_path / "dense", keep)), abs=1e-4)
