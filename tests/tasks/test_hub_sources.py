"""hf: sources against a stand-in of the hub, in processes of their own that start offline as the pipeline does."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_stand_in import COMMIT, Hub, hub_stand_in
from tiny import tiny_llama, tiny_tokenizer
from wrappers import save_wrapper

from nirvana.errors import InputError

ROOT = Path(__file__).parents[2]

RUN = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from importlib import import_module
from nirvana.errors import InputError
from tasks.params import Corpus
step, output, values = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
kinds = {"corpus": Corpus, "model": SimpleNamespace}
params = SimpleNamespace(**{key: kinds[key](**section) for key, section in values.items()})
try:
    import_module(f"tasks.{step}").run(params, {}, {output: Path("data") / output})
except InputError as error:
    sys.exit(f"InputError: {error}")
import datasets.config, huggingface_hub.constants
assert huggingface_hub.constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE, "offline mode was not restored"
"""


def fetch(hub: Hub, step: str, output: str, values: dict, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run one fetch step in `directory` with the stand-in as the hub and a home of its own."""
    home = directory / "home"
    home.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        environment.pop(name, None)
    command = [sys.executable, "-c", RUN, step, output, json.dumps(values)]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300)


def model_values(source: str) -> dict:
    return {"model": {"source": source, "trust_remote_code": False}}


def corpus_values(source: str, **changes: object) -> dict:
    corpus = {
        "source": source,
        "config": None,
        "split": "train",
        "text_field": "text",
        "max_documents": 100,
        "strip": r"\[[^\]]*\]",
    }
    return {"corpus": corpus | changes}


@pytest.fixture(scope="module")
def hub_model(tmp_path_factory):
    model = tiny_llama(tmp_path_factory.mktemp("hub") / "model")
    (model / "pytorch_model.bin").write_bytes(b"never fetched")
    (model / "modeling_custom.py").write_text("raise SystemExit('never run')\n")
    (model / "onnx").mkdir()
    (model / "onnx" / "config.json").write_text("{}")
    return model


@pytest.fixture(scope="module")
def hub_corpus(tmp_path_factory):
    corpus = tmp_path_factory.mktemp("hub") / "corpus"
    (corpus / "plain").mkdir(parents=True)
    (corpus / "other").mkdir()
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {name}/{split}.jsonl\n"
        for name, split in (("plain", "train"), ("other", "validation"))
    )
    (corpus / "README.md").write_text(card + "---\n")
    rows = [{"text": f"Speech {i} [Applause] ends.", "year": i} for i in range(20)] + [{"text": " ", "year": 20}]
    (corpus / "plain" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (corpus / "other" / "validation.jsonl").write_text(json.dumps({"body": "Another text."}) + "\n")
    return corpus


@pytest.mark.slow
def test_model_of_the_hub(hub_model, tmp_path):
    with hub_stand_in({"models/acme/tiny": hub_model}) as hub:
        done = fetch(hub, "fetch_model", "model", model_values("hf:acme/tiny@v1.0"), tmp_path)
    assert done.returncode == 0, done.stderr
    fetched = tmp_path / "data" / "model"
    assert (fetched / "model.safetensors").read_bytes() == (hub_model / "model.safetensors").read_bytes()
    record = json.loads((fetched / "nirvana_source.json").read_text())
    assert record["source"] == "hf:acme/tiny@v1.0"
    assert record["resolved"] == f"hf:acme/tiny@{COMMIT}"
    assert record["digest"].startswith("sha256:")
    names = {file.name for file in fetched.iterdir()}
    assert {"config.json", "tokenizer.json"} <= names
    assert not names & {"pytorch_model.bin", "modeling_custom.py", "onnx"}
    assert not [request for request in hub.requests if ".bin" in request or "onnx/" in request]
    assert "can move" in done.stderr  # a tag is accepted, with the commit to pin
    assert not [file for file in (tmp_path / "home").rglob("*") if file.is_file()]


@pytest.mark.slow
def test_pinned_commit_gives_the_same_digest(hub_model, tmp_path):
    digests = []
    with hub_stand_in({"models/acme/tiny": hub_model}) as hub:
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            done = fetch(hub, "fetch_model", "model", model_values(f"hf:acme/tiny@{COMMIT}"), tmp_path / name)
            assert done.returncode == 0, done.stderr
            assert "can move" not in done.stderr
            digests.append(json.loads((tmp_path / name / "data/model/nirvana_source.json").read_text())["digest"])
    assert digests[0] == digests[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("hf:acme/tiny", "pin a commit"),
        ("hf:acme/tiny@v2.0", "no such revision"),
        ("hf:acme/absent@v1.0", "no such repository"),
        ("hf:acme/pickled@v1.0", "pickled weights"),
        ("hf:acme/other@v1.0", "unsupported architecture 'gpt2': expected one of gemma3_text"),
        ("hf:acme/unknown@v1.0", "hf:acme/unknown@v1.0/config.json: expected the configuration of one of gemma3_text"),
    ],
)
def test_model_that_the_hub_cannot_give(source, reason, hub_model, tmp_path):
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"")
    repositories = {"models/acme/tiny": hub_model, "models/acme/pickled": pickled}
    for name, model_type in (("other", "gpt2"), ("unknown", "no_such_model")):
        shutil.copytree(hub_model, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": model_type}))
        repositories[f"models/acme/{name}"] = tmp_path / name
    with hub_stand_in(repositories) as hub:
        done = fetch(hub, "fetch_model", "model", model_values(source), tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("InputError: ") and reason in last
    assert not (tmp_path / "data" / "model").exists()
    assert not [request for request in hub.requests if request.endswith(".safetensors")], "weights were asked for"


@pytest.mark.slow
def test_wrapper_of_the_hub_in_shards_of_odd_names(tmp_path):
    """The index is asked for first; its shards, the licence and further chat templates come, the text part stays."""
    model = save_wrapper("mistral3", tmp_path / "model", shard_size="60KB")
    tiny_tokenizer().save_pretrained(model)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    renames = {name: name.replace("model-0", "part-00") for name in set(index["weight_map"].values())}
    for old, new in renames.items():
        (model / old).rename(model / new)
    index["weight_map"] = {tensor: renames[name] for tensor, name in index["weight_map"].items()}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "additional_chat_templates").mkdir()
    for name in ("LICENSE", "additional_chat_templates/tools.jinja", "consolidated.safetensors"):
        (model / name).write_text("x")
    with hub_stand_in({"models/acme/whole": model}) as hub:
        done = fetch(hub, "fetch_model", "model", model_values("hf:acme/whole@v1.0"), tmp_path)
    assert done.returncode == 0, done.stderr
    fetched = tmp_path / "data" / "model"
    assert (fetched / "additional_chat_templates" / "tools.jinja").read_text() == "x"
    assert (fetched / "LICENSE").is_file()
    record = json.loads((fetched / "nirvana_source.json").read_text())
    assert record["resolved"] == f"hf:acme/whole@{COMMIT}" and record["text_part_of"] == "mistral3"
    assert json.loads((fetched / "config.json").read_text())["model_type"] == "mistral"
    assert not [request for request in hub.requests if "consolidated" in request]
    assert not [file for file in fetched.iterdir() if file.name.startswith(".")]


@pytest.mark.slow
def test_adapter_of_the_hub_is_named(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "acme/base"}')
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    with hub_stand_in({"models/acme/adapter": adapter}) as hub:
        done = fetch(hub, "fetch_model", "model", model_values("hf:acme/adapter@v1.0"), tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert "found an adapter of acme/base; merge it first" in last and 'from_pretrained("acme/adapter")' in last


def test_hub_out_of_reach(tmp_path):
    hub = Hub({}, "v1.0", endpoint="http://127.0.0.1:9")
    done = fetch(hub, "fetch_model", "model", model_values("hf:acme/tiny@v1.0"), tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("InputError: hf:acme/tiny@v1.0: the hub could not be reached"), done.stderr


def test_corpus_of_the_hub_is_streamed(hub_corpus, tmp_path):
    with hub_stand_in({"datasets/acme/talks": hub_corpus}) as hub:
        values = corpus_values("hf:acme/talks@v1.0", config="plain", max_documents=5)
        done = fetch(hub, "fetch_corpus", "corpus", values, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "data/corpus/documents.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"id": f"train:{i}", "text": f"Speech {i} ends."} for i in range(5)]
    record = json.loads((tmp_path / "data/corpus/source.json").read_text())
    assert record["resolved"] == f"hf:acme/talks@{COMMIT}"
    assert record["documents"] == 5
    assert not [request for request in hub.requests if "other/" in request and "GET" in request]
    assert not [file for file in (tmp_path / "home").rglob("*") if file.is_file()]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"config": "plain", "text_field": "body"}, "text, year"),
        ({"config": "plain", "split": "test"}, "train"),
        ({"config": "absent"}, "other"),
    ],
)
def test_corpus_that_the_hub_cannot_give(changes, reason, hub_corpus, tmp_path):
    with hub_stand_in({"datasets/acme/talks": hub_corpus}) as hub:
        done = fetch(hub, "fetch_corpus", "corpus", corpus_values("hf:acme/talks@v1.0", **changes), tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("InputError: ") and reason in last, done.stderr
    assert not (tmp_path / "data" / "corpus").exists()


@pytest.mark.parametrize("large", [True, False])
def test_a_download_that_is_not_what_the_hub_has_is_refused_and_not_kept(tmp_path, large):
    from huggingface_hub._local_folder import write_download_metadata

    from tasks.sources.hub import _check_download

    content = b"weights" * 100
    git = hashlib.sha1(b"blob 700\0" + content).hexdigest()
    etag = hashlib.sha256(content).hexdigest() if large else git
    (tmp_path / "a.bin").write_bytes(content)
    write_download_metadata(tmp_path, "a.bin", "0" * 40, etag)
    _check_download(tmp_path, "a.bin")
    (tmp_path / "a.bin").write_bytes(content[:300] + b"V" + content[301:])
    with pytest.raises(InputError, match=r"^a.bin: expected what the hub has .* run the same command again$"):
        _check_download(tmp_path, "a.bin")
    assert not (tmp_path / "a.bin").exists()
