"""Every study from its spec to a record: a tiny model, in this process, without a server."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from tiny import random_ids, tiny_corpus, tiny_llama

from nirvana.files import sha256_file, write_json
from studies.run import measure, record, report
from studies.spec import load_spec, study_names
from studies.subject import Asked, Subject
from tasks.corpus.documents import Document, write_documents

ROOT = Path(__file__).parents[2]
TRAINED = {"steps": "4", "vocabulary": "128", "neurons": "24", "layers": "2", "hidden": "16", "windows": "4"}
SMALL = {
    "modules": {"ratios": "0.05,0.1"},
    "alignment": {"prompt_length": "8", "decode_tokens": "2", "repeats": "2"},
    "zero_shot": {"items": "12"},
    "fine_tuning": {"training_tokens": "1024", "methods": "dense,nirvana,best"},
    "calibration_study": {"sequences": "2", "length": "16", "counts": "2,4", "lengths": "8,16", "length_tokens": "32"},
    "ntk": {"steps": "4", "kernel_sequences": "2", "finetuning_steps": "2", "curve_every": "1", "loss_sequences": "4"},
    "families": TRAINED | {"families": "llama,phi3", "methods": "fisher,flap", "compensation_sequences": "33"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkout with a tiny model, token ids and a corpus; studies share its cache and store."""
    home = tmp_path_factory.mktemp("studies")
    tiny_llama(home / "model", num_attention_heads=8, num_key_value_heads=4, intermediate_size=256, num_hidden_layers=3)
    for number, name in enumerate(("calibration", "calibration_extra", "heldout", "evaluation")):
        write_json(home / f"ids/{name}_ids.json", random_ids(20, 16, number).tolist())
    speeches = sorted(tiny_corpus(home / "speeches", documents=120, sentences=120).iterdir())
    (home / "corpus").mkdir()
    write_documents(home / "corpus/documents.jsonl", [Document(each.name, each.read_text()) for each in speeches])
    write_json(home / "corpus/source.json", {"digest": sha256_file(home / "corpus/documents.jsonl")})
    shutil.copy(ROOT / "params.yaml", home)
    return home


@pytest.mark.slow
@pytest.mark.parametrize("name", study_names())
def test_a_study_from_spec_to_record(name, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/mlflow.db")
    spec = load_spec(name)
    asked = Asked(place / "ids", corpus=place / "corpus", tokens=128, processes=1, quick=True).limited()
    subject = Subject(asked, {"model": place / "model", "corpus": place / "corpus"}, spec.judges_tokens)
    values = spec.values(True, SMALL.get(name, {}))
    measured = measure(spec, subject, values)
    json.dumps([measured.rows, measured.parameters, measured.notes], default=str)  # no tensors among steps
    made = report(spec, measured, values)
    files = {file.name: file for file in made.files}
    assert {f"{name}.png", f"{name}.svg", f"{name}.csv"} <= set(files)
    assert files[f"{name}.png"].stat().st_size > 20_000
    for table in spec.tables:
        file = files.get(f"{name}{'_' + table['name'] if 'name' in table else ''}.csv")
        if file is not None:
            rows = list(csv.DictReader(file.open()))
            assert rows and not any(None in row or None in row.values() for row in rows)
            filled = {column for row in rows for column, value in row.items() if value != ""}
            assert set(rows[0]) - filled <= {"unreachable"}, "a column that no row fills"
    assert made.tables and made.conclusion and made.children
    assert not any("{" in sentence for sentence in made.conclusion)
    run_id = record(spec, measured, made)
    again = Subject(asked, subject.files, spec.judges_tokens)
    assert [_steady(row) for row in measure(spec, again, values).rows] == [_steady(row) for row in measured.rows]
    assert "comparison" not in vars(again) or "stack" not in vars(again.comparison)  # nothing was opened
    assert record(spec, measured, made) == run_id


def _steady(row):
    return {key: value for key, value in row.items() if "seconds" not in key}
