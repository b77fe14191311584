"""Both evaluation steps judge the same tokens of the same text, whatever class a tokenizer file names."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizer_files as files
import torch
from exports import write_plan
from tiny import save_family
from tokenizers import Tokenizer

from nirvana.perplexity import token_perplexity
from nirvana.surgery import prune
from nirvana.walk import Stack
from tasks import evaluate, evaluate_dense
from tasks.corpus.documents import Document, write_documents

WINDOW, TOKENS = 16, 64


@pytest.mark.parametrize(
    ("name", "class_name", "config"),
    [
        ("phi3", "LlamaTokenizer", {}),
        ("granite", "LlamaTokenizerFast", {}),
        ("mistral", "GPT2Tokenizer", {}),
        ("qwen2", "LlamaTokenizerFast", {"nirvana_reading": "class"}),
        ("qwen2", "LlamaTokenizerFast", {"nirvana_reading": "file"}),
    ],
)
def test_dense_and_pruned_are_judged_on_the_same_tokens(name, class_name, config, tmp_path):
    dense = save_family(name, tmp_path / "dense")
    files.byte_level(dense, class_name, **config)
    site = Stack.open(dense).architecture.sites()[0]  # whole, so that layers differ and the pruned class is needed
    prune(dense, write_plan(tmp_path, {site.name: np.arange(site.units)}), tmp_path / "pruned")
    (tmp_path / "evaluation").mkdir()
    text = " ".join(files.words()[:20])
    write_documents(tmp_path / "evaluation/documents.jsonl", [Document("1", text)])
    (tmp_path / "recovered").mkdir()
    (tmp_path / "recovered/nirvana_recovery.json").write_text('{"form": "none"}')
    asked = SimpleNamespace(
        window=WINDOW, perplexity_tokens=TOKENS, tasks=[], cloze_items=0, continuation_items=0, batch_size=1, limit=None
    )
    runtime = SimpleNamespace(device="cpu", execution="auto", memory="auto", workers=1, scheduler=None)
    params = SimpleNamespace(evaluation=asked, runtime=runtime)
    inputs = {"model": dense, "evaluation_data": tmp_path / "evaluation"}
    outputs = {key: tmp_path / f"{key}.json" for key in ("evaluation_dense", "lm_eval_dense", "evaluation", "lm_eval")}
    evaluate_dense.run(params, inputs, outputs)
    inputs |= {"checkpoint": tmp_path / "pruned", "recovered": tmp_path / "recovered"}
    evaluate.run(params, inputs, outputs)

    witness = Tokenizer.from_file(str(dense / "tokenizer.json"))
    if config.get("nirvana_reading") == "class":  # its rules are not in the file: transformers' own class says
        from transformers import Qwen2Tokenizer

        read = Qwen2Tokenizer.from_pretrained(dense)
        stream = read(text, add_special_tokens=False)["input_ids"] + read("\n\n", add_special_tokens=False)["input_ids"]
    else:
        stream = [
            *witness.encode(text, add_special_tokens=False).ids,
            *witness.encode("\n\n", add_special_tokens=False).ids,
        ]
    body = WINDOW - 1  # the file puts <s>, id 0, before a text
    available = len(stream) // body
    rows = [stream[start * body : (start + 1) * body] for start in (n * available // 4 for n in range(4))]
    windows = torch.tensor([[0, *row] for row in rows])
    for file, folder in (("evaluation_dense", dense), ("evaluation", tmp_path / "pruned")):
        reported = json.loads((tmp_path / f"{file}.json").read_text())
        assert reported["bos"] is True
        expected = token_perplexity(Stack.open(folder), windows, windows[:, 1:])
        assert reported["token_perplexity"] == pytest.approx(expected, rel=1e-6), file
