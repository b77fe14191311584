"""The recover step: nothing where nothing is asked for; else text of the calibration split, and one model to judge."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import random_keep, tiny_corpus, tiny_llama, tiny_t5
from transformers import AutoTokenizer

from nirvana.allocation import Allocation
from nirvana.checkpoint.digests import DIGESTS_NAME, check_digests
from nirvana.checkpoint.recovered import RECOVERY_NAME
from nirvana.errors import InputError
from nirvana.export.export import export_checkpoint
from nirvana.loading import load_model
from nirvana.plan import Plan
from nirvana.surgery import prune
from nirvana.walk import Stack
from nirvana.weights import WeightFiles, model_digest
from tasks import recover, sample_pool
from tasks.corpus.documents import Document, read_documents, write_documents
from tasks.evaluation.evaluated_checkpoint import judged_checkpoint
from tasks.params import Recovery
from tasks.recovery import fine_tuning
from tasks.recovery.recovery_text import training_text
from tasks.sample_pool import Encoder, split_documents

SETTINGS = {
    "tokens": 768,
    "seed": 0,
    "rank": 4,
    "alpha": 8,
    "learning_rate": 0.01,
    "warmup": 0.1,
    "distillation": 0.5,
    "sequence_length": 16,
    "batch": 4,
    "curve_every": 256,
    "merge": True,
}


def make_inputs(root: Path, model: Path) -> dict[str, Path]:
    """Make what the earlier steps would have left."""
    speeches = tiny_corpus(root / "speeches", documents=30, sentences=8)
    documents = [Document(file.stem, file.read_text()) for file in sorted(speeches.glob("*.txt"))]
    write_documents(root / "corpus" / "documents.jsonl", documents)
    calibration = SimpleNamespace(
        seed=0,
        pool_size=1,
        sequences=2,
        sequence_length=16,
        add_bos=False,
        heldout_sequences=2,
        heldout_length=16,
        repeated=0.0,
    )
    names = ("corpus", "candidates", "heldout", "compensation_corpus", "evaluation_data", "checkpoint")
    inputs = {name: root / name for name in names}
    inputs["model"] = model
    compensation = SimpleNamespace(method="none", sequence_length=16)
    sample_pool.run(SimpleNamespace(calibration=calibration, compensation=compensation), inputs, inputs)
    sites = Stack.open(model).architecture.sites()
    whole = next(site for site in sites if site.module == "attention")
    plan = Plan.build(
        sites,
        random_keep(sites) | {whole.name: np.arange(whole.units)},  # layers differ
        model_digest=model_digest(model),
        model_type="any",
        calibration_digest="sha256:none",
        allocation=Allocation(0.4),
    )
    prune(model, plan, inputs["checkpoint"])
    return inputs


def params(**changes: object) -> SimpleNamespace:
    return SimpleNamespace(
        recovery=Recovery(**SETTINGS | changes),
        calibration=SimpleNamespace(add_bos=False),
        compute=SimpleNamespace(threads=1),
        runtime=SimpleNamespace(device="cpu"),
    )


def outputs_in(root: Path) -> dict[str, Path]:
    return {
        "recovered": root / "recovered",
        "recovery": root / "recovery.json",
        "recovery_curve": root / "recovery.csv",
    }


def run_step(inputs: dict[str, Path], root: Path, **changes: object) -> dict[str, Path]:
    root.mkdir(exist_ok=True)
    recover.run(params(**changes), inputs, outputs_in(root))
    return outputs_in(root)


def content(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Leave states in the test's folder, and torch as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fine_tuning, "fix_torch", lambda threads: None)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("llama")
    return make_inputs(root, tiny_llama(root / "model"))


@pytest.fixture(scope="module")
def merged(inputs, tmp_path_factory):
    root = tmp_path_factory.mktemp("merged")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(fine_tuning, "fix_torch", lambda threads: None)
        return run_step(inputs, root / "outputs")


# -- nothing asked for ------------------------------------------------------------------------------------------------


def test_without_tokens_nothing_is_done_and_the_pruned_checkpoint_is_judged(tmp_path):
    nowhere = dict.fromkeys(("model", "corpus", "heldout", "checkpoint"), tmp_path / "absent")
    outputs = run_step(nowhere, tmp_path / "off", tokens=0)
    assert content(tmp_path / "off") == {
        f"recovered/{RECOVERY_NAME}": b'{\n  "form": "none"\n}\n',
        "recovery.json": b'{\n  "form": "none",\n  "tokens": 0\n}\n',
        "recovery.csv": b"tokens,training_loss,heldout_loss,heldout_kl\n",
    }
    with judged_checkpoint(tmp_path / "absent", outputs["recovered"]) as judged:
        assert judged == tmp_path / "absent"
    assert not (tmp_path / ".cache").exists()


def test_without_tokens_torch_and_peft_stay_unloaded():
    code = (
        "import sys; from types import SimpleNamespace as N; from pathlib import Path; from tasks import recover; "
        "o = {'recovered': Path('r'), 'recovery': Path('r.json'), 'recovery_curve': Path('r.csv')}; "
        "recover.run(N(recovery=N(tokens=0)), {}, o); print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(recover.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# -- text -------------------------------------------------------------------------------------------------------------


def letters(text, **_):
    """Stand in for a tokenizer: one token a character."""
    return {"input_ids": [ord(character) for character in text]}


def test_text_is_the_documents_end_to_end_and_no_more_than_the_budget():
    documents = [Document("a", "abcdefg"), Document("b", "hijkl")]
    encoder = Encoder(letters, vocabulary=1000)
    (whole,) = training_text(documents, encoder, None, tokens=100, length=3, seed=0)
    joined = "".join(map(chr, whole.flatten().tolist()))
    assert joined in ("abcdefg\n\nhijkl\n\n"[:15], "hijkl\n\nabcdefg\n\n"[:15])
    assert whole.shape == (5, 3)
    (budget,) = training_text(documents, encoder, None, tokens=7, length=3, seed=0)
    assert torch.equal(budget, whole[:3])
    texts = [training_text(documents, encoder, None, tokens=9, length=3, seed=seed)[0] for seed in range(9)]
    assert len({tuple(text[0].tolist()) for text in texts}) == 2
    with_bos = Encoder(letters, vocabulary=1000, bos=7)
    (begun,) = training_text(documents, with_bos, None, tokens=100, length=3, seed=0)
    assert begun[:, 0].tolist() == [7] * 5 and torch.equal(begun[:, 1:], whole[:, 1:])
    with pytest.raises(InputError, match=r"recovery\.sequence_length: expected .* documents of 20 tokens .* got 16"):
        training_text(documents, encoder, None, tokens=100, length=20, seed=0)


def test_only_documents_of_the_calibration_split_are_read(inputs, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        fine_tuning, "training_text", lambda documents, *_, **__: read.extend(documents) or (torch.zeros(4, 16).long(),)
    )
    run_step(inputs, tmp_path / "outputs", tokens=64)
    splits = split_documents(read_documents(inputs["corpus"] / "documents.jsonl"))
    assert read == splits["calibration"]
    judged = {document.id for document in [*splits["heldout"], *splits["evaluation"]]}
    assert judged and not judged & {document.id for document in read}


# -- what comes out ---------------------------------------------------------------------------------------------------


def test_the_recovered_checkpoint_is_judged_and_loads_as_the_pruned_one(inputs, merged):
    with judged_checkpoint(inputs["checkpoint"], merged["recovered"]) as judged:
        assert judged == merged["recovered"]
    model = load_model(merged["recovered"])
    assert model.config.model_type == "nirvana_llama"
    before, after = WeightFiles(inputs["checkpoint"]), WeightFiles(merged["recovered"])
    assert {name: before.shape(name) for name in before} == {name: after.shape(name) for name in after}
    assert AutoTokenizer.from_pretrained(merged["recovered"]).bos_token == "<s>"


def test_an_export_would_leave_out_what_was_recovered(inputs, merged, tmp_path):
    with pytest.raises(InputError, match=r"expected the checkpoint that prune wrote, got one that was fine-tuned"):
        export_checkpoint(merged["recovered"], "hf", inputs["model"], tmp_path / "export")


def test_the_curve_and_the_summary_say_what_the_models_do(inputs, merged):
    from tasks.corpus.token_files import read_ids

    (heldout,) = read_ids(inputs["heldout"])
    summary = json.loads(merged["recovery"].read_text())
    with merged["recovery_curve"].open() as file:
        rows = list(csv.DictReader(file))
    assert [row["tokens"] for row in rows] == ["0", "256", "512", "768"]
    assert rows[0]["training_loss"] == ""
    assert (summary["form"], summary["tokens"], summary["steps"]) == ("merged", 768, 12)
    measured = {}
    for name, directory in (
        ("dense", inputs["model"]),
        ("pruned", inputs["checkpoint"]),
        ("recovered", merged["recovered"]),
    ):
        with torch.no_grad():
            measured[name] = float(load_model(directory)(input_ids=heldout, labels=heldout).loss)
    assert summary["heldout_loss"] == pytest.approx(measured, rel=1e-5)
    assert [float(rows[0]["heldout_loss"]), float(rows[-1]["heldout_loss"])] == [
        summary["heldout_loss"]["pruned"],
        summary["heldout_loss"]["recovered"],
    ]
    assert summary["heldout_loss"]["recovered"] < summary["heldout_loss"]["pruned"]
    assert summary["heldout_kl"]["recovered"] < summary["heldout_kl"]["pruned"]


def test_twice_gives_the_same_bytes_and_leaves_no_state(inputs, merged, tmp_path):
    outputs = run_step(inputs, tmp_path / "outputs")
    assert content(outputs["recovered"].parent) == content(merged["recovered"].parent)
    assert list((tmp_path / fine_tuning.CACHE).iterdir()) == []


def test_an_adapter_alone_is_judged_as_the_merged_checkpoint(inputs, merged, tmp_path):
    outputs = run_step(inputs, tmp_path / "outputs", merge=False)
    names = {"adapter_config.json", "adapter_model.safetensors", RECOVERY_NAME}
    assert {file.name for file in outputs["recovered"].iterdir()} == names
    assert outputs["recovery_curve"].read_bytes() == merged["recovery_curve"].read_bytes()
    with judged_checkpoint(inputs["checkpoint"], outputs["recovered"]) as judged:
        found = content(judged)
        whole = content(merged["recovered"])
        assert found == {k: v for k, v in whole.items() if k not in (RECOVERY_NAME, DIGESTS_NAME)}
    assert check_digests(merged["recovered"])
    assert not judged.exists()


def test_an_encoder_decoder_is_trained_on_pairs(tmp_path):
    inputs = make_inputs(tmp_path, tiny_t5(tmp_path / "model"))
    outputs = run_step(inputs, tmp_path / "outputs", sequence_length=64, tokens=2560)
    losses = json.loads(outputs["recovery"].read_text())["heldout_loss"]
    assert losses["recovered"] < losses["pruned"]
    with judged_checkpoint(inputs["checkpoint"], outputs["recovered"]) as judged:
        assert load_model(judged).config.is_encoder_decoder


def test_a_directory_that_does_not_say_what_it_holds_is_refused(tmp_path):
    (tmp_path / "recovered").mkdir()
    with pytest.raises(InputError, match="expected a JSON file"), judged_checkpoint(tmp_path, tmp_path / "recovered"):
        pass
    (tmp_path / "recovered" / RECOVERY_NAME).write_text('{"form": "copied"}')
    with (
        pytest.raises(InputError, match=r"form: expected one of none, merged, adapter, got 'copied'"),
        judged_checkpoint(tmp_path, tmp_path / "recovered"),
    ):
        pass


def test_nothing_is_left_of_a_run_that_fails(inputs, tmp_path):
    with pytest.raises(InputError, match="expected a finite loss"):
        run_step(inputs, tmp_path / "outputs", learning_rate=10.0)
    assert content(tmp_path / "outputs") == {}


STEP = """
import json, sys
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[1])
from types import SimpleNamespace
from tasks import recover
from tasks.params import Recovery
params = SimpleNamespace(
    recovery=Recovery(**json.loads(sys.argv[2])),
    calibration=SimpleNamespace(add_bos=False),
    compute=SimpleNamespace(threads=1),
    runtime=SimpleNamespace(device="cpu"),
)
paths = [{name: Path(path) for name, path in json.loads(each).items()} for each in sys.argv[3:]]
recover.run(params, *paths)
"""


@pytest.mark.slow
def test_a_killed_step_goes_on_to_the_same_bytes(inputs, tmp_path):
    settings = json.dumps(SETTINGS | {"tokens": 64 * 60, "curve_every": 64 * 20})
    as_text = {name: str(path) for name, path in inputs.items()}

    def command(root):
        outputs = {name: str(path) for name, path in outputs_in(root).items()}
        path = json.dumps([str(Path(recover.__file__).parents[1])])
        return [sys.executable, "-c", STEP, path, settings, json.dumps(as_text), json.dumps(outputs)]

    for name in ("whole", "killed"):
        (tmp_path / name / "outputs").mkdir(parents=True)
    subprocess.run(command(tmp_path / "whole/outputs"), cwd=tmp_path / "whole", check=True, capture_output=True)
    states = tmp_path / "killed" / fine_tuning.CACHE
    process = subprocess.Popen(
        command(tmp_path / "killed/outputs"), cwd=states.parents[1], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not list(states.glob("*.safetensors")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert content(tmp_path / "killed/outputs") == {} and list(states.glob("*.safetensors"))
    done = subprocess.run(
        command(tmp_path / "killed/outputs"), cwd=tmp_path / "killed", check=True, capture_output=True, text=True
    )
    assert content(tmp_path / "killed/outputs") == content(tmp_path / "whole/outputs")
    assert list(states.iterdir()) == [], done.stderr
