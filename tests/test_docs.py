"""What docs/checkpoints.md shows about other tools is run, on pruned models of the kinds that it speaks of."""

import re
from pathlib import Path

import pytest
import torch
from exports import make_checkpoint
from tiny import random_ids, tiny_t5

from nirvana.architectures.registry import describe
from nirvana.loading import load_model
from nirvana.surgery import prune

PAGE = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text(encoding="utf-8")


def block(after: str) -> str:
    """Return the first block of Python behind a phrase of the page."""
    text = PAGE[PAGE.index(after) :]
    indent, code = re.search(r"\n( *)```python\n(.*?)```", text, flags=re.DOTALL).groups()
    return re.sub(f"^{indent}", "", code, flags=re.MULTILINE)


def run(code: str, **names):
    exec(code, names)
    return names


def test_peft_reaches_the_experts_of_a_pruned_mixture(tmp_path):
    make_checkpoint("qwen3_moe", tmp_path)
    model = load_model(tmp_path / "pruned")
    tuned = run(block("The experts of a mixture"), model=model)["model"]
    trained = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
    for part in ("q_proj", "experts"):
        assert any(part in name for name in trained), part
    ids = random_ids(2, 12)
    tuned(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: parameter.grad for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert any(g is not None and g.abs().sum() > 0 for name, g in gradients.items() if "experts" in name)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name and "experts" in name:
                parameter.fill_(0.01)
        before = tuned(input_ids=ids).logits
    merged = tuned.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged/modeling_nirvana.py").is_file()
    with torch.no_grad():
        again = load_model(tmp_path / "merged")(input_ids=ids).logits
        plain = load_model(tmp_path / "pruned")(input_ids=ids).logits
    assert torch.allclose(again, before, atol=1e-4) and not torch.allclose(again, plain, atol=1e-3)


def test_peft_on_a_pruned_decoder(tmp_path):
    make_checkpoint("llama", tmp_path)
    tuned = run(block("**peft.**"), model=load_model(tmp_path / "pruned"))["model"]
    modules = {name.split(".")[-4] for name, p in tuned.named_parameters() if p.requires_grad}
    assert modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_recovery_says_what_it_does_not_reach(tmp_path, caplog):
    from nirvana.adapter import attach

    make_checkpoint("qwen3_moe", tmp_path)
    attach(load_model(tmp_path / "pruned"), describe(tmp_path / "pruned"), 2, 4.0, 0)
    assert "keep what pruning left" in caplog.text and "experts" in caplog.text


@pytest.mark.slow
def test_lm_eval_judges_a_pruned_t5(tmp_path):
    from exports import write_plan
    from lm_eval.api.instance import Instance
    from transformers import AutoTokenizer

    tiny_t5(tmp_path / "dense")
    prune(tmp_path / "dense", write_plan(tmp_path, {}), tmp_path / "pruned")
    model, tokenizer = load_model(tmp_path / "pruned"), AutoTokenizer.from_pretrained(tmp_path / "pruned")
    code = block("**lm-eval.**")
    lines = [line for line in code.splitlines() if "decoder-only" not in line]
    judge = run("\n".join(lines), model=model, tokenizer=tokenizer)["judge"]
    request = Instance("loglikelihood", {}, ("The great nation", "protects the river."), 0)
    ((value, _),) = judge.loglikelihood([request], disable_tqdm=True)
    source = torch.tensor([tokenizer("The great nation")["input_ids"]])
    target = tokenizer("protects the river.", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logs = model(input_ids=source, labels=torch.tensor([target])).logits[0].log_softmax(-1)
    assert value == pytest.approx(logs.gather(1, torch.tensor(target)[:, None]).sum().item(), rel=1e-4)
