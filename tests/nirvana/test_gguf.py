"""GGUF exports say in llama.cpp what the pruned model says in transformers."""

import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from exports import exported, left_over, make_checkpoint, slow_but, write_plan
from real_model import real_model
from tiny import tiny_corpus, tiny_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nirvana.checkpoint.digests import DIGESTS_NAME
from nirvana.checkpoint.prose import PROSE
from nirvana.errors import InputError
from nirvana.export import gguf as export_gguf
from nirvana.export import llama_cpp
from nirvana.export.export import Options, export_checkpoint
from nirvana.export.gguf import to_halves, to_neighbours
from nirvana.export.gguf_tokenizer import describe_tokenizer
from nirvana.files import sha256_file
from nirvana.loading import load_model
from nirvana.surgery import prune
from nirvana.walk import Stack

gguf = pytest.importorskip("gguf")
needs_llama_cpp = pytest.mark.skipif(not llama_cpp.is_installed(), reason="xllamacpp is not installed")
LAYOUTS = ["llama", "llama-mha", "llama-mqa", "llama-untied-biases", "llama3-rope", "mistral", "mistral-sliding"]
TEXT = "It's 1847: the great nation's 12,345 citizens   protect\n\n\tthe river; naïve — déjà vu, 日本語 & <tags> DON'T!"


def gguf_export(root, weight_type="f16", target=None):
    return exported(root, "gguf", target or f"gguf-{weight_type}", options=Options(weight_type=weight_type))


def file_of(done):
    (file,) = done.directory.glob("*.gguf")
    return file


def fields_of(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def greedy(directory, prompt, count):
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return load_model(directory).generate(ids, **settings)[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


# -- rows --------------------------------------------------------------------------------------------------------


def test_rows_by_hand():
    rows = torch.arange(8)[:, None] * torch.ones(8, 3, dtype=torch.int64)  # two heads of four rows
    assert to_neighbours(rows, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert to_neighbours(rows[:, 0], 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    many = torch.randn(48, 5)
    assert torch.equal(to_halves(to_neighbours(many, 16), 16), many)


def test_types_of_tensors(tmp_path):
    """Rows of 32 fit q8_0, the 29 neurons that a layer keeps do not; vectors stay whole."""
    root = make_checkpoint("llama", tmp_path)
    tensors = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file_of(gguf_export(root, "q8_0"))).tensors}
    assert tensors["blk.0.ffn_up.weight"] == tensors["token_embd.weight"] == "Q8_0"
    assert tensors["blk.0.ffn_down.weight"] == "F16"
    assert tensors["output_norm.weight"] == "F32"
    assert "output.weight" not in tensors  # tied


# -- what llama.cpp says -----------------------------------------------------------------------------------------


@needs_llama_cpp
@pytest.mark.parametrize("name", slow_but(("llama",), LAYOUTS))
def test_unrounded_the_layout_is_exact(name, tmp_path, monkeypatch):
    """With matrices in f32 nothing but the layout is left to differ: order of rows, rotary factors, biases, sizes."""
    monkeypatch.setattr(export_gguf, "_kind", lambda shape, weight_type: gguf.GGMLQuantizationType.F32)
    done = gguf_export(make_checkpoint(name, tmp_path))
    assert done.parity.runtime == "llama.cpp"
    assert done.parity.max_abs_difference < 1e-4 and done.parity.top1_agreement == 1


@needs_llama_cpp
@pytest.mark.parametrize(("weight_type", "largest"), [("f16", 0.03), ("q8_0", 0.6)])
def test_llama_cpp_says_what_transformers_says(weight_type, largest, llama):
    prompt = list(range(30, 34))
    with torch.no_grad():
        expected = load_model(llama / "pruned")(torch.tensor([prompt])).logits[0].log_softmax(dim=1)
    done = gguf_export(llama, weight_type)
    assert 1e-4 < done.parity.max_abs_difference < largest
    told = llama_cpp.log_probabilities(file_of(done), prompt, np.arange(4), 512)
    torch.testing.assert_close(torch.from_numpy(told), expected, atol=largest, rtol=0)


@needs_llama_cpp
def test_greedy_text_is_the_same(llama):
    done = gguf_export(llama)
    prompt = AutoTokenizer.from_pretrained(llama / "pruned")("The great nation protects")["input_ids"]
    assert llama_cpp.greedy_tokens(file_of(done), prompt, 12) == greedy(llama / "pruned", prompt, 12)


@needs_llama_cpp
def test_wrong_rows_are_found(llama, monkeypatch):
    before = left_over(llama)
    monkeypatch.setattr(export_gguf, "to_neighbours", lambda rows, head_dim: rows)
    for weight_type in ("f16", "q8_0"):
        with pytest.raises(InputError, match="expected the logits of the dense model masked by the plan"):
            gguf_export(llama, weight_type, target="wrong")
    assert left_over(llama) == before


@needs_llama_cpp
def test_a_file_that_llama_cpp_cannot_run(llama, monkeypatch):
    before = left_over(llama)
    monkeypatch.setattr(export_gguf, "_layer_sizes", lambda stack, layer: (4, 2, 48 + layer))
    with pytest.raises(InputError, match=r"expected a file that llama\.cpp can run, got exit status"):
        gguf_export(llama, target="wrong")
    assert left_over(llama) == before


def test_without_llama_cpp_the_file_is_read_back(llama, monkeypatch):
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    done = gguf_export(llama, target="read-back")
    assert done.parity.runtime == "transformers" and done.parity.passed
    assert fields_of(file_of(done))["nirvana.parity.runtime"] == "transformers"
    monkeypatch.setattr(export_gguf, "to_neighbours", lambda rows, head_dim: rows.flip(0))
    with pytest.raises(InputError, match="masked by the plan"):
        gguf_export(llama, target="wrong")


# -- what the file holds -----------------------------------------------------------------------------------------


def test_layers_that_differ_are_deci(llama):
    fields = fields_of(file_of(gguf_export(llama)))
    config = Stack.open(llama / "pruned").architecture.config
    assert fields["general.architecture"] == "deci"
    assert fields["deci.attention.head_count"] == [config.per_layer_config[i].num_attention_heads for i in range(3)]
    assert fields["deci.attention.head_count_kv"] == [2, 1, 1]
    assert fields["deci.feed_forward_length"] == [29, 29, 29]
    assert fields["deci.attention.key_length"] == fields["deci.attention.value_length"] == 8


def test_equal_layers_are_llama(tmp_path):
    root = make_checkpoint("llama", tmp_path)
    prune(root / "dense", write_plan(root, {}), root / "pruned")
    fields = fields_of(file_of(gguf_export(root)))
    assert fields["general.architecture"] == "llama"
    assert fields["llama.attention.head_count_kv"] == 1 and fields["llama.feed_forward_length"] == 29


def test_the_finding_stands_in_the_file(llama):
    done = gguf_export(llama)
    fields = fields_of(file_of(done))
    assert fields["nirvana.parity.max_abs_difference"] == done.parity.max_abs_difference
    assert fields["nirvana.parity.tolerance"] == done.parity.tolerance
    assert fields["nirvana.parity.positions"] == done.parity.positions == 16
    assert json.loads((done.directory / "nirvana_export.json").read_text())["weight_type"] == "f16"


@pytest.mark.parametrize("weight_type", ["f16", "q8_0"])
def test_same_bytes_every_time(weight_type, llama):
    once, again = (file_of(gguf_export(llama, weight_type, target)) for target in ("once", "again"))
    assert sha256_file(once) == sha256_file(again)


def test_the_window_becomes_the_context(tmp_path, caplog):
    root = make_checkpoint("mistral-sliding", tmp_path)
    done = gguf_export(root)
    assert "attends to the last 6 tokens" in caplog.text
    assert fields_of(file_of(done))["deci.context_length"] == 6 and done.parity.positions == 5


# -- what cannot be written --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "t5-relu-tied"])
def test_other_families_are_refused(name, tmp_path):
    root = make_checkpoint(name, tmp_path)
    with pytest.raises(InputError, match=r"expected a model of llama, mistral .* use --to hf, uniform or padded"):
        gguf_export(root)
    assert left_over(root) == []


def test_other_rotary_scalings_are_refused(tmp_path):
    root = make_checkpoint("llama", tmp_path)
    for directory in (root / "dense", root / "pruned"):
        config = json.loads((directory / "config.json").read_text())
        config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
        (directory / "config.json").write_text(json.dumps(config))
    write_plan(root, {"layers.0.kv_group": np.arange(2)})
    with pytest.raises(InputError, match="expected rotary scaling default, linear, llama3"):
        gguf_export(root)


def test_values_too_large_for_f16(tmp_path):
    from safetensors.torch import load_file, save_file

    root = make_checkpoint("llama", tmp_path)
    weights = load_file(root / "dense/model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] *= 1e6
    save_file(weights, root / "dense/model.safetensors", {"format": "pt"})
    prune(root / "dense", write_plan(root, {}), root / "pruned")
    with pytest.raises(InputError, match="expected values below 65504"):
        gguf_export(root)
    assert left_over(root) == []


def test_the_extra_is_named(llama, monkeypatch):
    export_gguf.gguf_package.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'nirvana-pruning\[gguf\]'"):
        gguf_export(llama, target="none")
    export_gguf.gguf_package.cache_clear()


def test_unknown_weight_type(llama):
    with pytest.raises(InputError, match="expected one of f16, q8_0"):
        gguf_export(llama, "q4_0", target="none")


@pytest.mark.slow
def test_importing_the_exports_needs_no_gguf():
    code = "import sys; sys.modules['gguf'] = None; sys.modules['xllamacpp'] = None; import nirvana.export.export"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- tokenizers --------------------------------------------------------------------------------------------------


def trained(cut, tmp_path, **bpe):
    """Return a byte-level BPE tokenizer of 512 tokens that cuts text in a given way first."""
    tokenizer = Tokenizer(models.BPE(**bpe))
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [file.read_text() for file in tiny_corpus(tmp_path / "corpus", 4).iterdir()]
    tokenizer.train_from_iterator([*texts, "1847 12345 's 't 're DON'T  \n\n\t" * 30], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def split_by(name):
    from nirvana.export.gguf_tokenizer import _PRE_TOKENIZERS

    pattern = next(key[1] for key, value in _PRE_TOKENIZERS.items() if value == name)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def digits_apart():
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


@needs_llama_cpp
@pytest.mark.parametrize("pre", slow_but(("smollm",), ["gpt-2", "smollm", "llama-bpe", "dbrx", "stablelm2", "tekken"]))
def test_llama_cpp_cuts_text_like_the_tokenizer(pre, tmp_path):
    root = make_checkpoint("llama", tmp_path)
    cuts = {"gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False), "smollm": digits_apart}
    cut = cuts.get(pre, lambda: split_by(pre))()
    tokenizer = trained(cut, tmp_path, ignore_merges=pre in ("llama-bpe", "tekken"))
    for name in ("dense", "pruned"):
        tokenizer.save_pretrained(root / name)
    (root / "pruned" / DIGESTS_NAME).unlink()
    file = file_of(gguf_export(root))
    assert fields_of(file)["tokenizer.ggml.pre"] == pre
    for text in (TEXT, PROSE):
        assert llama_cpp.tokenize(file, text) == tokenizer(text)["input_ids"]


@pytest.mark.slow
@needs_llama_cpp
def test_llama_cpp_cuts_text_like_a_sentencepiece_tokenizer(tmp_path):
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    texts = [file.read_text() for file in tiny_corpus(tmp_path / "corpus", 4).iterdir()]
    # the real ones do not merge across words either
    words = [word for text in texts for word in text.split()]
    tokenizer.train_from_iterator(words, trainer)
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["id"] < 3]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    root = make_checkpoint("llama", tmp_path)
    for name in ("dense", "pruned"):
        fast.save_pretrained(root / name)
    (root / "pruned" / DIGESTS_NAME).unlink()  # another tokenizer than the one it was written with
    file = file_of(gguf_export(root))
    fields = fields_of(file)
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"] is True
    for text in ("The great nation protects the river.", PROSE[:400], "naïve 日本"):
        assert llama_cpp.tokenize(file, text) == fast(text)["input_ids"]


def test_an_unknown_way_to_cut_is_default_with_a_warning(caplog, tmp_path):
    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=True), tmp_path)
    with caplog.at_level(logging.WARNING):
        assert describe_tokenizer(tokenizer, 512).pre == "default"
    assert "llama.cpp may cut this text into other tokens" in caplog.text


def test_special_tokens_and_template(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    described = describe_tokenizer(tokenizer, 512)
    assert described.special == {"bos": 0, "eos": 1}
    assert described.chat_template == tokenizer.chat_template
    assert (described.add_bos, described.add_eos) == (False, False)
    assert len(described.tokens) == len(described.types) == 512
    assert described.tokens[-1] == "[PAD511]" and described.types[-1] == gguf.TokenType.UNUSED
    assert described.types[0] == gguf.TokenType.CONTROL
    with pytest.raises(InputError, match="does not belong to this model"):
        describe_tokenizer(tokenizer, 100)


def test_other_tokenizers_are_refused():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece({"a": 0}, unk_token="a")))
    with pytest.raises(InputError, match="expected a BPE tokenizer"):
        describe_tokenizer(tokenizer, 512)


# -- the real model ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_llama_cpp
def test_smollm2(tmp_path):
    model = real_model()
    stack = Stack.open(model)
    sites = stack.architecture.sites()
    keep = {site.name: np.arange(site.units) for site in sites}  # the last layers lose most
    for site in sites:
        if site.layer >= 20:
            keep[site.name] = keep[site.name][: 2 if site.module == "attention" else 1280 + 8 * (site.layer - 20)]
    (tmp_path / "dense").symlink_to(model)
    plan = write_plan(tmp_path, keep)
    prune(model, plan, tmp_path / "pruned")
    prompt = AutoTokenizer.from_pretrained(model)("The president of the United States is")["input_ids"]
    expected = greedy(tmp_path / "pruned", prompt, 16)
    for weight_type, largest in (("f16", 0.05), ("q8_0", 1.5)):
        done = export_checkpoint(
            tmp_path / "pruned", "gguf", model, tmp_path / weight_type, options=Options(weight_type=weight_type)
        )
        assert done.parity.max_abs_difference < largest
        assert done.parity.top1_agreement >= 0.8
        if weight_type == "f16":
            assert llama_cpp.greedy_tokens(file_of(done), prompt, 16) == expected
            assert llama_cpp.tokenize(file_of(done), TEXT) == AutoTokenizer.from_pretrained(model)(TEXT)["input_ids"]
