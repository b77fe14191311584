"""What studies have DVC bring up to date before they read the pipeline's text."""

import pytest
from ruamel.yaml import YAML
from tiny import tiny_corpus, tiny_llama

from flows import study, zero_shot
from flows.study import Asked
from tasks.documents import Document, write_documents
from tasks.params import PARAMS_FILE
from tasks.registry import paths, step

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
    files = {name: tmp_path / path for name, path in paths("sample_pool")[1].items()}
    files |= {"model": tiny_llama(tmp_path / "model"), "corpus": tmp_path / "corpus"}
    asked = Asked(tokens=2, compensation_sequences=4)
    found = zero_shot.read_texts.__wrapped__(asked, files, tmp_path / "corpus")
    assert found.compensation.ids.shape == (4, content["compensation"]["sequence_length"])
