"""The syntax of sources; wheels without a network; what a model directory must hold."""

import hashlib
import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny import tiny_llama

from nirvana.errors import InputError
from nirvana.weight_names import INDEX_NAME, weight_names
from nirvana.weights import weight_files
from tasks.sources import pypi
from tasks.sources.gguf_model import convert_gguf
from tasks.sources.model_directory import check_model_directory, check_safetensors, vocabulary_size, wanted_files
from tasks.sources.source import HubSource, PathSource, PypiSource, parse_source


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("hf:org/name@abc123", HubSource("org/name", "abc123")),
        ("hf:gpt2@refs/pr/1", HubSource("gpt2", "refs/pr/1")),
        ("path:some dir/model", PathSource(Path("some dir/model"))),
        ("pypi:a-b==1.2.post1#a_b/data/*.txt", PypiSource("a-b", "1.2.post1", "a_b/data/*.txt")),
    ],
)
def test_parse(text, source):
    assert parse_source(text) == source


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("hf:org/name", "pin a commit"),
        ("hf:org/name@", "pin a commit"),
        ("hf:../etc@main", "repository name"),
        ("pypi:name#member", "pin the exact version"),
        ("pypi:name>=1#member", "pin the exact version"),
        ("pypi:name==1", "after #"),
        ("path:", "no path"),
        ("s3:bucket/key", "expected hf:ORG/NAME@REVISION"),
        ("model", "expected hf:ORG/NAME@REVISION"),
    ],
)
def test_parse_refuses(text, reason):
    with pytest.raises(InputError, match=reason):
        parse_source(text)


def make_wheel(directory: Path, members: dict[str, str], name: str = "corpus-1.0-py3-none-any.whl") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(directory / name, "w") as archive:
        for member, text in members.items():
            archive.writestr(member, text)
    return directory / name


def test_extract_takes_the_named_members_only(tmp_path):
    wheel = make_wheel(tmp_path, {"p/d/b.txt": "b", "p/d/a.txt": "a", "p/d/deep/c.txt": "c", "p/__init__.py": "boom"})
    target = tmp_path / "out"
    files = pypi.extract_members(wheel, "p/d/*.txt", target)
    assert [file.relative_to(target).as_posix() for file in files] == ["p/d/a.txt", "p/d/b.txt"]
    assert files[1].read_text() == "b"
    assert sorted(file.name for file in target.rglob("*") if file.is_file()) == ["a.txt", "b.txt"]


def test_extract_refuses_what_is_absent_or_broken(tmp_path):
    wheel = make_wheel(tmp_path, {"p/a.txt": "a"})
    with pytest.raises(InputError, match="found none among 1"):
        pypi.extract_members(wheel, "p/b.txt", tmp_path)
    wheel.write_bytes(b"PK but not a zip")
    with pytest.raises(InputError, match="broken zip"):
        pypi.extract_members(wheel, "p/a.txt", tmp_path)


@pytest.mark.parametrize("member", ["../evil.txt", "/tmp/evil.txt", "p/../../evil.txt", "..\\evil.txt"])
def test_extract_stays_inside(member, tmp_path):
    wheel = make_wheel(tmp_path / "wheel", {member: "evil"})
    target = tmp_path / "deep" / "out"
    target.mkdir(parents=True)
    with pytest.raises(InputError, match="outside the archive"):
        pypi.extract_members(wheel, member, target)
    assert not list(tmp_path.rglob("*evil*"))


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """Replace pip by a script of (status, output, wheel or None); records the calls and the pauses."""
    calls: list[str] = []
    pauses: list[float] = []
    script: list[tuple[int, str, bool]] = []

    def run(requirement: str, directory: Path) -> tuple[int, str]:
        calls.append(requirement)
        status, output, gives_wheel = script.pop(0)
        if gives_wheel:
            make_wheel(directory, {"p/a.txt": "a"})
        return status, output

    monkeypatch.setattr(pypi, "_pip_download", run)
    monkeypatch.setattr(pypi.time, "sleep", pauses.append)
    return script, calls, pauses


BROKEN = "WARNING: Retrying after connection broken by 'NewConnectionError'\nERROR: No matching distribution found"


def test_download_tries_again_then_uses_the_cache(pip, tmp_path):
    script, calls, pauses = pip
    script += [(1, BROKEN, False), (0, "Saved", True)]
    wheel = pypi.download_wheel("corpus", "1.0", tmp_path)
    assert calls == ["corpus==1.0"] * 2
    assert pauses == [2.0]
    assert pypi.download_wheel("corpus", "1.0", tmp_path) == wheel
    assert len(calls) == 2


def test_download_replaces_a_broken_wheel(pip, tmp_path):
    script, calls, _ = pip
    (tmp_path / "corpus-1.0").mkdir()
    (tmp_path / "corpus-1.0" / "corpus-1.0-py3-none-any.whl").write_bytes(b"half")
    script += [(0, "Saved", True)]
    assert zipfile.is_zipfile(pypi.download_wheel("corpus", "1.0", tmp_path))
    assert calls == ["corpus==1.0"]


@pytest.mark.parametrize("position", [12, 45, 200, -100, -10])
def test_a_wheel_with_one_flipped_bit_is_downloaded_again(pip, tmp_path, position):
    """The end of the file, which says that it is a zip, is whole: every member's checksum is what counts."""
    script, calls, _ = pip
    (tmp_path / "corpus-1.0").mkdir()
    wheel = make_wheel(tmp_path / "corpus-1.0", {"corpus/a.txt": "x" * 300, "corpus/b.txt": "y" * 300})
    content = bytearray(wheel.read_bytes())
    content[position] ^= 4
    wheel.write_bytes(content)
    whole = pypi._is_whole(wheel)
    script += [] if whole else [(0, "Saved", True)]
    found = pypi.download_wheel("corpus", "1.0", tmp_path)
    if whole:  # a time or an attribute, which nobody reads: its members are as they were
        assert zipfile.ZipFile(found).read("corpus/a.txt") == b"x" * 300
    else:
        assert calls == ["corpus==1.0"] and pypi._is_whole(found)
        assert (tmp_path / "corpus-1.0" / f"{wheel.name}.broken").read_bytes() == content


def test_download_without_a_network_gives_up_with_a_remedy(pip, tmp_path):
    script, calls, pauses = pip
    script += [(1, BROKEN, False)] * 3
    with pytest.raises(InputError, match=r"could not be reached .3 attempts.; connect to the network, or put"):
        pypi.download_wheel("corpus", "1.0", tmp_path)
    assert len(calls) == 3
    assert pauses == [2.0, 4.0]


def test_download_of_an_absent_release_is_not_repeated(pip, tmp_path):
    script, calls, _ = pip
    script += [(1, "ERROR: Could not find a version that satisfies corpus==1.0 (from versions: 0.9)", False)]
    with pytest.raises(InputError, match=r"from versions: 0\.9"):
        pypi.download_wheel("corpus", "1.0", tmp_path)
    assert len(calls) == 1


def test_real_pip_fetches_a_wheel_from_a_local_index(tmp_path, monkeypatch):
    made = make_wheel(
        tmp_path / "index",
        {
            "toy_corpus/a.txt": "a",
            "toy_corpus-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: toy-corpus\nVersion: 1.0\n",
            "toy_corpus-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "toy_corpus-1.0.dist-info/RECORD": "",
        },
        "toy_corpus-1.0-py3-none-any.whl",
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    wheel = pypi.download_wheel("toy-corpus", "1.0", tmp_path / "cache")
    assert hashlib.sha256(wheel.read_bytes()).digest() == hashlib.sha256(made.read_bytes()).digest()
    with pytest.raises(InputError, match=r"from versions: 1\.0"):
        pypi.download_wheel("toy-corpus", "2.0", tmp_path / "cache")


def test_wanted_files_are_never_pickled_nor_nested():
    names = [
        "config.json",
        "model.safetensors",
        "merges.txt",
        "pytorch_model.bin",
        "x.pt",
        "code.py",
        "onnx/config.json",
    ]
    weights = ["model.safetensors"]
    assert wanted_files(names, weights, trust_remote_code=False) == ["config.json", "merges.txt", "model.safetensors"]
    assert "code.py" in wanted_files(names, weights, trust_remote_code=True)


def test_what_a_tokenizer_and_a_licence_need_is_wanted():
    wanted = ["LICENSE", "NOTICE.md", "additional_chat_templates/tools.jinja", "chat_template.jinja", "spiece.model"]
    wanted += [
        "qwen.tiktoken",
        "sentencepiece.bpe.model",
        "tekken.json",
        "tokenizer.model",
        "vocab.txt",
        "USE_POLICY.md",
    ]
    left = ["README.md", "additional_chat_templates/deep/x.jinja", "model.safetensors.index.json", "runs/vocab.txt"]
    left += ["pytorch_model.bin.index.json", "flax_model.msgpack", "consolidated.safetensors", "model.gguf"]
    weights = ["model.safetensors"]
    assert wanted_files([*wanted, *left], weights, trust_remote_code=False) == sorted([*wanted, *weights])


ONE, TWO = "model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors"


@pytest.mark.parametrize(
    ("names", "listed", "weights"),
    [
        (["model.safetensors"], None, ["model.safetensors"]),
        ([INDEX_NAME, ONE, TWO, "consolidated.safetensors"], [ONE, TWO], [ONE, TWO]),  # six digits
        ([INDEX_NAME, "of any name.safetensors", "b.safetensors"], ["of any name.safetensors"], None),
        # as transformers: the whole file goes before an index
        (["model.safetensors", INDEX_NAME, ONE], [ONE], ["model.safetensors"]),
        (["weights.safetensors", "adapter_model.safetensors"], None, ["weights.safetensors"]),
        ([ONE, TWO], None, []),  # which belong together?
        (["consolidated.safetensors"], None, []),
        (["pytorch_model.bin", "x/model.safetensors"], None, []),
    ],
)
def test_one_function_says_which_files_are_weights(names, listed, weights, tmp_path):
    """For a list of names and for a directory that holds them."""
    index = {"weight_map": {str(number): name for number, name in enumerate(listed or [])}}
    weights = listed if weights is None else weights
    assert weight_names(names, lambda: index, "place") == weights
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(index) if name == INDEX_NAME else "")
    if weights:
        assert [file.name for file in weight_files(tmp_path)] == weights
    else:
        with pytest.raises(InputError, match=r"expected the weight file model\.safetensors or an index"):
            weight_files(tmp_path)


def test_home_directory_is_spelled_out(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_source("path:~/models/x") == PathSource(tmp_path / "models" / "x")
    with pytest.raises(InputError, match="home directory that the system does not know"):
        parse_source("path:~nobody-of-that-name/x")


@pytest.fixture
def model(tmp_path):
    return tiny_llama(tmp_path / "model")


def test_whole_model_passes(model):
    check_model_directory(model)
    assert vocabulary_size(model) == 512


def cut_off(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def cut_header(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:40])


def empty(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"")


def garble_header(model: Path) -> None:
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 12) + b"not a header" + b"x" * 100)


def header_of_another_shape(model: Path) -> None:
    header = json.dumps({"weight": {"dtype": "F32"}}).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def lose_config(model: Path) -> None:
    (model / "config.json").unlink()


def garble_config(model: Path) -> None:
    (model / "config.json").write_text("{")


def unknown_family(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "no-such-family"}))


def lose_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


def garble_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")


def small_vocabulary(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))


def lose_shard(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = {"metadata": {}, "weight_map": shards}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def shard_elsewhere(model: Path) -> None:
    lose_shard(model)
    index = {"weight_map": {"a": "../model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def empty_index(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_off, "model.safetensors: expected .* bytes as its header says, got .* fetch it again"),
        (cut_header, "model.safetensors: expected a safetensors header"),
        (empty, "model.safetensors: expected a safetensors header, got 0 bytes"),
        (garble_header, "model.safetensors: expected a safetensors header, got something else"),
        (header_of_another_shape, "model.safetensors: expected a safetensors header, got something else"),
        (pickled, "pytorch_model.bin; pickled weights .* are not loaded .* convert them"),
        (lose_config, "config.json: expected a JSON file"),
        (garble_config, "config.json: expected JSON"),
        (unknown_family, "config.json: expected the configuration of one of gemma3_text"),
        (lose_tokenizer, "expected tokenizer files"),
        (garble_tokenizer, "expected tokenizer files"),
        (small_vocabulary, "tokenizer has [0-9]+ tokens, the model's vocab_size is 300"),
        (lose_shard, "expected the weight file model-00002-of-00002.safetensors"),
        (empty_index, "expected a weight_map"),
        (shard_elsewhere, "expected file names beside it"),
    ],
)
def test_damaged_model_is_named(damage, reason, model):
    damage(model)
    with pytest.raises(InputError, match=reason) as caught:
        check_model_directory(model)
    assert "\n" not in str(caught.value)


def test_a_whole_file_goes_before_an_index(model):
    """As transformers reads them."""
    lose_shard(model)
    (model / "model-00001-of-00002.safetensors").rename(model / "model.safetensors")
    check_model_directory(model)


def test_safetensors_of_the_library_passes(tmp_path):
    import numpy
    from safetensors.numpy import save_file

    save_file({"a": numpy.zeros((3, 5)), "b": numpy.ones(7, dtype=numpy.int8)}, tmp_path / "x.safetensors", {"k": "v"})
    check_safetensors(tmp_path / "x.safetensors")


def test_not_a_gguf_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"something else")
    with pytest.raises(InputError, match="begins with the bytes GGUF"):
        convert_gguf(tmp_path / "model.gguf", tmp_path)


def test_cut_off_gguf_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(InputError, match="transformers cannot read this GGUF file") as caught:
        convert_gguf(tmp_path / "model.gguf", tmp_path)
    assert "\n" not in str(caught.value)


def test_parsing_needs_no_heavy_import():
    heavy = "any(m in sys.modules for m in ('torch', 'datasets'))"
    code = f"import sys, tasks.sources.source, tasks.sources.pypi; sys.exit({heavy})"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
