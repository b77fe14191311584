"""What studies have DVC bring up to date before they read the pipeline's text."""

import importlib
import json

import pytest
import typer
from ruamel.yaml import YAML
from tiny import tiny_corpus, tiny_llama

from flows import study, zero_shot
from flows.options import SELF_GENERATED
from flows.study import Asked
from tasks.corpus.documents import Document, write_documents
from tasks.params import PARAMS_FILE
from tasks.registry import step

ROOT_PARAMS = PARAMS_FILE.resolve()


@pytest.mark.parametrize(("module", "more"), [(study, ()), (zero_shot, (None,))])
def test_a_step_comes_after_those_that_it_reads(module, more, monkeypatch):
    """Each is brought by itself: DVC would miss what an earlier one makes."""
    brought: list[str] = []
    monkeypatch.setattr(module, "bring", brought.extend)
    module.prepare.__wrapped__(Asked(), *more)
    assert "sample_pool" in brought
    known: set[str] = set()
    for name in brought:
        assert set(step(name).inputs) <= known, name
        known |= set(step(name).outs)


def test_another_corpus_needs_nothing_that_the_model_wrote(tmp_path, monkeypatch):
    """Preset `best` asks for such text, but a study has its own written."""
    yaml = YAML()
    content = yaml.load(ROOT_PARAMS)
    content["method"]["preset"] = "best"
    content["calibration"] |= {"sequence_length": 32, "heldout_length": 32}
    yaml.dump(content, tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    texts = sorted(tiny_corpus(tmp_path / "texts", documents=120).iterdir())
    (tmp_path / "corpus").mkdir()
    write_documents(tmp_path / "corpus/documents.jsonl", (Document(file.stem, file.read_text()) for file in texts))
    files = {"model": tiny_llama(tmp_path / "model"), "corpus": tmp_path / "corpus"}
    asked = Asked(tokens=2, compensation_sequences=4)
    found = zero_shot.read_texts.__wrapped__(asked, files)
    assert found.compensation.ids.shape == (4, content["compensation"]["sequence_length"])


@pytest.mark.parametrize("name", ["compare", "zero_shot", "fine_tuning", "quantised"])
def test_the_models_own_text_is_asked_for_unless_it_is_refused(name, monkeypatch):
    """A flow that dropped the option would fit on less text, and say nothing."""
    flow, told = importlib.import_module(f"flows.{name}"), []
    monkeypatch.setattr(flow, "run", lambda study, asked, *more: told.append(asked.self_generated))
    app = typer.Typer()
    app.command()(flow.main)
    for arguments in ([], ["--self-generated", "0"], ["--self-generated", "7"]):
        app(arguments, standalone_mode=False)
    assert told == [SELF_GENERATED, 0, 7] and SELF_GENERATED > 0
    app(["--quick"], standalone_mode=False)
    assert 0 < told[-1] < SELF_GENERATED


def test_a_quick_study_fits_on_little():
    quick = Asked.of(None, None, 4096, None, True, compensation_sequences=160, self_generated=96)
    assert (quick.tokens, quick.compensation_sequences, quick.self_generated) == (2048, 32, 24)
    less = Asked.of(None, None, 100, None, True, compensation_sequences=5, self_generated=0)
    assert (less.tokens, less.compensation_sequences, less.self_generated) == (100, 5, 0)
    whole = Asked.of(None, None, 4096, None, compensation_sequences=160, self_generated=96)
    assert (whole.tokens, whole.compensation_sequences, whole.self_generated) == (4096, 160, 96)


def test_what_is_asked_for_reaches_the_text_and_is_said(tmp_path, monkeypatch):
    model = tiny_llama(tmp_path / "model")
    ids = tmp_path / "ids"
    ids.mkdir()
    for part in ("calibration", "calibration_extra", "heldout", "evaluation"):
        (ids / f"{part}_ids.json").write_text(json.dumps([list(range(8))] * 4))
    monkeypatch.chdir(tmp_path)
    for count in (0, 3):
        asked = Asked(ids, model, tokens=8, compensation_sequences=5, self_generated=count)
        texts = study.read_texts.__wrapped__(asked, {"model": model})
        assert texts.compensation.ids.shape == (5 + count, 8)
        own = ", 3 x 8 of them the dense model's own" if count else ""
        assert study.fitted_on(texts, asked) == f"compensation was fitted on {5 + count} x 8 tokens{own}"
