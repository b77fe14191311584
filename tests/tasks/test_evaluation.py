"""Both evaluation steps on a tiny model, lm-eval and its cloze task included, without network."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_corpus, tiny_llama, tiny_t5
from transformers import AutoTokenizer

from nirvana.checkpoint.recovered import write_form
from nirvana.errors import InputError
from nirvana.perplexity import token_perplexity, windows_from_documents
from nirvana.walk import Stack
from tasks import evaluate, evaluate_dense
from tasks.corpus.documents import Document, write_documents
from tasks.evaluation import quality as evaluation
from tasks.evaluation.lm_eval_json import deterministic, headline_metrics

ITEMS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    speeches = tiny_corpus(folder / "speeches", documents=12)
    texts = [file.read_text(encoding="utf-8") for file in sorted(speeches.glob("*.txt"))]
    write_documents(folder / "documents.jsonl", [Document(f"document-{i}", text) for i, text in enumerate(texts)])
    return folder


def _params(**changes: object) -> SimpleNamespace:
    asked = {
        "window": 32,
        "perplexity_tokens": 320,
        "cloze_items": ITEMS,
        "continuation_items": ITEMS,
        "tasks": ["cloze"],
        "limit": None,
        "batch_size": 4,
    }
    runtime = SimpleNamespace(device="cpu", execution="auto", memory="auto", workers=1, scheduler=None)
    return SimpleNamespace(evaluation=SimpleNamespace(**asked | changes), runtime=runtime)


def _evaluate(model: Path, documents: Path, folder: Path, **changes: object) -> tuple[Path, Path]:
    outputs = {"evaluation": folder / "evaluation.json", "lm_eval": folder / "lm_eval.json"}
    write_form(documents, "none")
    inputs = {"checkpoint": model, "recovered": documents, "evaluation_data": documents}
    evaluate.run(_params(**changes), inputs, outputs)
    return outputs["evaluation"], outputs["lm_eval"]


@pytest.fixture(scope="module")
def results(model, documents, tmp_path_factory) -> tuple[Path, Path]:
    return _evaluate(model, documents, tmp_path_factory.mktemp("reports"))


def test_summary(results):
    summary = json.loads(results[0].read_text())
    assert set(summary) == {
        "token_perplexity",
        "token_perplexity_tokens",
        "token_perplexity_window",
        "token_perplexity_kind",
        "bos",
        "tasks",
    }
    assert summary["token_perplexity_kind"] == "next_token"
    assert (summary["token_perplexity_tokens"], summary["token_perplexity_window"]) == (310, 32)
    assert summary["bos"] is False  # the tokenizer has one and does not put it
    cloze = summary["tasks"]["cloze"]
    assert (cloze["metric"], cloze["items"]) == ("acc", ITEMS)
    # the standard error of a share: sqrt(p (1 - p) / (n - 1))
    assert cloze["stderr"] == pytest.approx((cloze["value"] * (1 - cloze["value"]) / (ITEMS - 1)) ** 0.5)


def test_perplexity_is_that_of_the_documents(results, model, documents):
    texts = [json.loads(line)["text"] for line in (documents / "documents.jsonl").read_text().splitlines()]
    windows = windows_from_documents(AutoTokenizer.from_pretrained(model), texts, 32, 320, add_bos=False)
    expected = token_perplexity(Stack.open(model), windows, windows[:, 1:])
    assert json.loads(results[0].read_text())["token_perplexity"] == expected


def test_raw_results_are_kept_without_what_changes(results, tmp_path):
    text = results[1].read_text()
    raw = json.loads(text)
    assert "acc_stderr,none" in raw["results"]["cloze"]
    assert len(raw["samples"]["cloze"]) == ITEMS
    assert {"doc_id", "doc_hash", "acc"} <= set(raw["samples"]["cloze"][0])
    assert "nirvana-evaluation-" not in text
    assert str(tmp_path.parent) not in text
    assert not {"date", "pretty_env_info", "git_hash", "total_evaluation_time_seconds"} & set(raw)


def test_both_steps_twice_give_the_same_bytes(results, model, documents, tmp_path):
    outputs = {"evaluation_dense": tmp_path / "dense.json", "lm_eval_dense": tmp_path / "lm_eval_dense.json"}
    evaluate_dense.run(_params(), {"model": model, "evaluation_data": documents}, outputs)
    assert outputs["evaluation_dense"].read_bytes() == results[0].read_bytes()
    assert outputs["lm_eval_dense"].read_bytes() == results[1].read_bytes()


def test_both_own_tasks_offline(results, model, documents, tmp_path):
    summary, _ = _evaluate(model, documents, tmp_path, tasks=["continuation", "cloze"], continuation_items=5)
    tasks = json.loads(summary.read_text())["tasks"]
    assert tasks["cloze"] == json.loads(results[0].read_text())["tasks"]["cloze"]
    assert (tasks["continuation"]["metric"], tasks["continuation"]["items"]) == ("acc", 5)


def test_limit_shortens_every_task(model, documents, tmp_path):
    summary, _ = _evaluate(model, documents, tmp_path, limit=3)
    assert json.loads(summary.read_text())["tasks"]["cloze"]["items"] == 3


def test_without_tasks_there_is_perplexity_alone(results, model, documents, tmp_path):
    """Streamed it needs no room for the model, which lm-eval does."""
    summary_file, raw_file = _evaluate(model, documents, tmp_path, tasks=[])
    summary = json.loads(summary_file.read_text())
    assert summary == json.loads(results[0].read_text()) | {"tasks": {}}
    assert json.loads(raw_file.read_text())["samples"] == {}


def test_a_tokenizer_without_bos_is_said(documents, tmp_path):
    model = tiny_llama(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(model)
    summary, _ = _evaluate(model, documents, tmp_path)
    assert json.loads(summary.read_text())["bos"] is False


@pytest.mark.parametrize(
    ("name", "sentinels", "kind", "tokens"),
    # 5 of 32 tokens leave, in 2 spans: with 2 sentinels and EOS 8 tokens a target; or halves of 16 and EOS
    [
        ("t5-relu-tied", 100, "span_corruption", 80),
        ("t5-gated-gelu-untied", 100, "span_corruption", 80),
        ("t5-relu-tied", 0, "halves", 170),
    ],
)
def test_an_encoder_decoder(documents, tmp_path, name, sentinels, kind, tokens):
    model = tiny_t5(tmp_path / "model", name, sentinels=sentinels)
    summary_file, raw_file = _evaluate(model, documents, tmp_path)
    summary, raw = json.loads(summary_file.read_text()), json.loads(raw_file.read_text())
    assert (summary["token_perplexity_kind"], summary["token_perplexity_tokens"]) == (kind, tokens)
    assert summary["bos"] is False
    assert 50 < summary["token_perplexity"] < 50_000
    assert summary["tasks"]["cloze"]["items"] == len(raw["samples"]["cloze"]) == ITEMS
    again, _ = _evaluate(model, documents, tmp_path / "again")
    assert again.read_bytes() == summary_file.read_bytes()


def test_the_last_word_of_an_encoder_decoder_is_a_blank(documents, tmp_path):
    """Its score is the log-likelihood of sentinel and word, computed here from the logits."""
    model_directory = tiny_t5(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model = evaluation.load_model(model_directory)
    read = evaluation.read_documents(documents / "documents.jsonl")
    tasks, manager = evaluation._load_tasks(["cloze"], read, {"cloze": ITEMS}, "<extra_id_0>", tmp_path / "tasks")
    raw = evaluation._run_lm_eval(model, tokenizer, tasks, manager, 4, None)
    for sample in raw["samples"]["cloze"]:
        context, target = sample["arguments"][0]
        assert context.endswith(" <extra_id_0>") and target.startswith("<extra_id_0> ")
        source = tokenizer(context, return_tensors="pt").input_ids
        labels = tokenizer(target, add_special_tokens=False, return_tensors="pt").input_ids
        assert source[0, -1] == tokenizer.eos_token_id
        with torch.no_grad():
            logs = model(input_ids=source, labels=labels).logits[0].log_softmax(-1)
        expected = logs.gather(1, labels[0][:, None]).sum().item()
        assert sample["filtered_resps"][0][0] == pytest.approx(expected, rel=1e-4)


class _LoadedError(AssertionError):
    """The model was loaded although the input is wrong."""


@pytest.fixture
def no_model(monkeypatch):
    def refuse(*arguments):
        raise _LoadedError

    monkeypatch.setattr(evaluation, "load_model", refuse)


@pytest.fixture
def own_tasks(monkeypatch):
    """Stand in for lm-eval's 14,683 tasks, which take 20 s to index, with one that needs the hub."""
    import lm_eval.tasks

    class Manager(lm_eval.tasks.TaskManager):
        def __init__(self, include_path, include_defaults):
            assert include_defaults
            needs_hub = {"task": "far_away", "dataset_path": "nobody/nothing", "test_split": "test"}
            (Path(include_path) / "far_away.yaml").write_text(json.dumps(needs_hub))
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Manager)


@pytest.mark.usefixtures("no_model", "own_tasks")
def test_unknown_task_is_named_before_the_model_is_loaded(documents, model, tmp_path):
    with pytest.raises(InputError, match=r"evaluation\.tasks: .*got 'clozee'; did you mean cloze"):
        _evaluate(model, documents, tmp_path, tasks=["clozee"])
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_model", "own_tasks")
def test_unreachable_task_data_is_one_line(documents, model, tmp_path):
    with pytest.raises(InputError, match=r"data of far_away.*network") as caught:
        _evaluate(model, documents, tmp_path, tasks=["cloze", "far_away"])
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_model")
def test_too_few_documents_is_found_before_the_model_is_loaded(documents, model, tmp_path):
    with pytest.raises(InputError, match=r"evaluation\.cloze_items"):
        _evaluate(model, documents, tmp_path, cloze_items=100_000)
    with pytest.raises(InputError, match=r"evaluation\.continuation_items"):
        _evaluate(model, documents, tmp_path, tasks=["continuation"], continuation_items=100_000)
    with pytest.raises(InputError, match=r"evaluation\.perplexity_tokens"):
        _evaluate(model, documents, tmp_path, perplexity_tokens=10_000_000)


def test_paper_stands_for_eight_tasks():
    assert evaluation.expand(["cloze", "paper", "piqa"]) == ["cloze", *evaluation.PAPER]
    assert len(evaluation.PAPER) == 8


@pytest.mark.slow  # lm-eval takes 20 s to index its tasks
def test_lm_eval_knows_the_tasks_of_the_paper():
    from lm_eval.tasks import TaskManager

    assert set(evaluation.PAPER) <= set(TaskManager().all_tasks)


def test_headline_prefers_accuracy_and_says_what_lm_eval_lacks():
    raw = {
        "results": {
            "wikitext": {"alias": "wikitext", "word_perplexity,none": 20.5, "word_perplexity_stderr,none": "N/A"},
            "piqa": {"acc_norm,none": 0.7, "acc_norm_stderr,none": 0.02, "acc,none": 0.6, "acc_stderr,none": 0.01},
            "group": {"alias": "group"},
        },
        "n-samples": {"wikitext": {"original": 62, "effective": 62}, "piqa": {"original": 9, "effective": 5}},
    }
    assert headline_metrics(raw) == {
        "wikitext": {"metric": "word_perplexity", "value": 20.5, "stderr": None, "items": 62},
        "piqa": {"metric": "acc", "value": 0.6, "stderr": 0.01, "items": 5},
    }


def test_deterministic_leaves_json_values_only():
    def process(doc):
        return doc

    raw = {
        "results": {"t": {"ppl,none": float("inf")}},
        "configs": {"t": {"process_docs": process, "dataset_kwargs": {"data_files": "/tmp/x/t.jsonl"}}},
        "config": {"model_dtype": torch.float32, "device": "cpu", "limit": None},
        "samples": {"t": [{"doc_id": 0, "doc": {"text": "secret"}, "acc": torch.tensor(1.0)}]},
        "date": 1.0,
    }
    kept = deterministic(raw, "/tmp/x")
    assert json.loads(json.dumps(kept, allow_nan=False)) == kept
    assert kept["configs"]["t"]["dataset_kwargs"] == {"data_files": "t.jsonl"}
    assert "0x" not in kept["configs"]["t"]["process_docs"]
    assert kept["samples"] == {"t": [{"doc_id": 0, "acc": 1.0}]}
    assert kept["config"] == {"model_dtype": "torch.float32", "limit": None}
